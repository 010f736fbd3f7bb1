"""BERT-base in fresh processes: `rzc.open` against `rzc.get` and the usual ways to load files.

    PYTHONPATH=tests python benches/opening.py

Each row is the median of four new actors, interleaved with those of the other rows. The actors have
done their imports and loaded nothing. Times: the first load, then a first forward. Private memory:
the growth of RssAnon in the load. The files are in the page cache.
"""

import statistics
import tempfile
import time

import ray
import ray_zerocopy as rzc
import torch
from footprint import anonymous_memory, trim
from ray_zerocopy.store import opening  # noqa: F401 - imported before the clock starts
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

PROCESSES = 4


def by_get(source):
    return rzc.get(source["refs"][0])


def by_open(source):
    return rzc.open(source["rzc"])


def by_torch(source):
    return torch.load(source["pt"], mmap=True, weights_only=False)


def by_safetensors(source):
    with torch.device("meta"):
        model = BertModel(BertConfig())
    model.load_state_dict(load_file(source["safetensors"]), assign=True)
    embeddings = model.embeddings  # its buffers are not in the state dict
    embeddings.position_ids = torch.arange(512)[None]
    embeddings.token_type_ids = torch.zeros(1, 512, dtype=torch.long)
    return model.eval()


WAYS = {"rzc.get": by_get, "rzc.open": by_open}
WAYS |= {"torch.load(mmap=True)": by_torch, "safetensors": by_safetensors}


class Loader:
    def load(self, way, source):
        inputs = torch.arange(16)[None]
        trim()
        before, start = anonymous_memory(), time.perf_counter()
        model = WAYS[way](source)
        loaded = time.perf_counter()
        grown = anonymous_memory() - before
        again = time.perf_counter()
        with torch.no_grad():
            output = model(input_ids=inputs)[0].sum().item()
        done = time.perf_counter()
        return loaded - start, loaded - start + done - again, grown, output


def main():
    ray.init(address="local", num_cpus=1, object_store_memory=700 << 20, log_to_driver=False)
    model = BertModel(BertConfig()).eval()
    rows = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        source = {kind: f"{folder}/model.{kind}" for kind in ("rzc", "pt", "safetensors")}
        rzc.save(model, source["rzc"])
        torch.save(model, source["pt"])
        save_file(model.state_dict(), source["safetensors"])
        source["refs"] = [rzc.put(model)]
        for _ in range(PROCESSES):
            for way in WAYS:
                loader = ray.remote(Loader).options(num_cpus=0).remote()
                ray.get(loader.__ray_ready__.remote())
                rows[way].append(ray.get(loader.load.remote(way, source)))
                ray.kill(loader)
    ray.shutdown()
    assert len({round(output, 2) for each in rows.values() for *_, output in each}) == 1, rows
    print("| way | load, ms | and a first forward, ms | private, MiB |\n|---|---|---|---|")
    for way, each in rows.items():
        loads, firsts, grown, _ = map(statistics.median, zip(*each, strict=True))
        print(f"| {way} | {loads * 1e3:.1f} | {firsts * 1e3:.0f} | {grown / 2**20:.1f} |")


if __name__ == "__main__":
    main()
