"""`python -m ray_zerocopy.demo`: share a model among workers, compared with plain Ray."""

from ray_zerocopy.operate.demo import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
