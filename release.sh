#!/usr/bin/env bash
# release.sh VERSION: set it, check everything, build wheels and sdist into dist/, and say how to publish them.
set -euo pipefail
cd "$(dirname "$0")"
version=${1:?"usage: ./release.sh VERSION"}

[[ $version =~ ^[0-9]+\.[0-9]+\.[0-9]+$ ]] || { echo "a version is three numbers, not $version" >&2; exit 2; }
[[ -z $(git status --porcelain) ]] || { echo "commit or stash first: the tree is not clean" >&2; exit 1; }
grep -q "^## $version" CHANGELOG.md || { echo "CHANGELOG.md has no section '## $version'" >&2; exit 1; }

sed -i "0,/^version = .*/s//version = \"$version\"/" pyproject.toml Cargo.toml
sed -i "s/^__version__ = .*/__version__ = \"$version\"/" python/ray_zerocopy/__init__.py
sed -i "s/^## $version.*/## $version ($(date +%F))/" CHANGELOG.md

make test                               # Cargo.lock takes the version up, too
rm -rf dist
make wheel
.venv/bin/pip install --quiet twine
.venv/bin/twine check --strict dist/*

git diff --stat
echo "commit as 'Release $version', tag v$version, then: .venv/bin/twine upload dist/*"
