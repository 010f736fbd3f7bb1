//! Rebuilds modules and tensors, with the installed extension in an interpreter of its own.
//! Compared with pickle, `__init__` and `torch.from_numpy`. Needs the feature `python`.
#![allow(missing_docs)] // the macros of criterion

use criterion::{Criterion, criterion_group, criterion_main};
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// As many modules and tensors as BERT-base has.
const PREPARE: &std::ffi::CStr = c"
import gc, pickle
import numpy as np
import torch
from ray_zerocopy import _core, skeleton
from ray_zerocopy.block import gather, open_block

gc.disable()
modules = [torch.nn.Dropout(0.1) for _ in range(228)]
pickled = pickle.dumps(modules)
joinable = skeleton.split(modules).skeleton

parameters = [torch.nn.Parameter(torch.randn(768)) for _ in range(201)]
parts = gather(skeleton.split(parameters))
flat = np.frombuffer(b''.join(map(bytes, parts.segments())), np.uint8).copy()
block = open_block(parts.table, [flat], 'shared')

def from_numpy():
    arrays = (np.ndarray((768,), np.float32, flat, offset) for offset, _ in block.spans)
    return [torch.nn.Parameter(torch.from_numpy(array)) for array in arrays]
";

fn rebuilding(c: &mut Criterion) {
    Python::initialize();
    Python::attach(|py| {
        let names = PyDict::new(py);
        py.run(PREPARE, Some(&names), None).unwrap();
        for (name, expression) in [
            ("modules/ours", c"skeleton.join(joinable, [], [])"),
            ("modules/pickle", c"pickle.loads(pickled)"),
            ("modules/__init__", c"[torch.nn.Dropout(0.1) for _ in range(228)]"),
            ("tensors/ours", c"block.tensors()"),
            ("tensors/from_numpy", c"from_numpy()"),
        ] {
            c.bench_function(&format!("rebuild/{name}"), |b| {
                b.iter(|| py.eval(expression, Some(&names), None).unwrap());
            });
        }
    });
}

criterion_group!(benches, rebuilding);
criterion_main!(benches);
