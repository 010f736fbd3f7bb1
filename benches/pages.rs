//! Maps a block privately: the cost of a load, and of filling its page table. Compared with the
//! faults of a first touch, and with a copy.
#![allow(missing_docs, unsafe_code)] // the macros of criterion; the store is named by address
#![cfg(target_os = "linux")]

use std::fs::{self, File};
use std::hint::black_box;
use std::path::Path;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use memmap2::MmapMut;
use ray_zerocopy::memory::pages::Pages;
use ray_zerocopy::memory::region::Region;

const NBYTES: usize = 64 << 20;
const PAGE: usize = 4096;

/// A file like Ray's: deleted, in shared memory, mapped shared and written to.
fn store() -> MmapMut {
    let path = Path::new("/dev/shm").join(format!("rzc-bench-{}", std::process::id()));
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    file.set_len(NBYTES as u64).unwrap();
    // SAFETY: the file is this process's own.
    let mut map = unsafe { MmapMut::map_mut(&file) }.unwrap();
    fs::remove_file(&path).unwrap();
    map.fill(7);
    map
}

fn touch(pages: &Pages) {
    // SAFETY: the store lives, and nobody writes.
    let bytes = unsafe { pages.region().bytes() };
    bytes.iter().step_by(PAGE).for_each(|byte| {
        black_box(*byte);
    });
}

fn mapping(c: &mut Criterion) {
    let store = store();
    let region = Region { address: store.as_ptr() as usize, nbytes: store.len() };
    // SAFETY: the store lives, and nobody writes.
    let map = || unsafe { Pages::private(region) }.unwrap();
    c.bench_function("pages/map", |b| b.iter(map));

    let mut group = c.benchmark_group("pages/fill");
    group.sample_size(20).throughput(Throughput::Bytes(NBYTES as u64));
    let prefault = |pages: &mut Pages| pages.prefault().unwrap().wait();
    group.bench_function("prefault", |b| {
        b.iter_batched_ref(map, prefault, BatchSize::PerIteration);
    });
    group.bench_function("first touch", |b| {
        b.iter_batched_ref(map, |pages| touch(pages), BatchSize::PerIteration);
    });
    group.bench_function("copy", |b| b.iter(|| store.to_vec()));
}

criterion_group!(benches, mapping);
criterion_main!(benches);
