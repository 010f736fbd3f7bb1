//! Moves bytes: writes a block from many storages, packs small storages, and copies a block that
//! came in pieces. Compared with `memcpy`.
#![allow(missing_docs, unsafe_code)] // the macros of criterion; the pieces are named by address

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ray_zerocopy::format::layout::Layout;
use ray_zerocopy::io::block::{copy, is_contiguous, pack, write};
use ray_zerocopy::memory::region::Region;

fn regions(storages: &[Vec<u8>]) -> Vec<Region> {
    storages.iter().map(|bytes| Region::of(bytes)).collect()
}

fn plan(storages: &[Vec<u8>]) -> Layout {
    Layout::plan(storages.iter().map(|bytes| bytes.len() as u64)).unwrap()
}

fn packing(c: &mut Criterion) {
    let mut group = c.benchmark_group("gather/pack");
    for count in [100, 1_500] {
        let storages = vec![vec![7; 3_072]; count];
        let pieces = regions(&storages);
        let layout = plan(&storages);
        group.throughput(Throughput::Bytes(layout.nbytes));
        group.bench_function(BenchmarkId::from_parameter(count), |b| {
            // SAFETY: the storages live and are only read.
            b.iter(|| unsafe { pack(black_box(&layout), &pieces, 1) });
        });
    }
}

fn writing(c: &mut Criterion) {
    let mut group = c.benchmark_group("gather/write");
    group.sample_size(20);
    let storages = vec![vec![7; 1 << 20]; 128];
    let pieces = regions(&storages);
    let layout = plan(&storages);
    let placed = || layout.spans.iter().zip(&pieces);
    let sources = || placed().map(|(span, &piece)| (span.offset, piece.into())).collect();
    let mut block = vec![0; layout.nbytes as usize + 64];
    let start = block.as_ptr().align_offset(64);
    group.throughput(Throughput::Bytes(layout.nbytes));
    group.bench_function("block", |b| {
        // SAFETY: the storages live and are only read.
        b.iter(|| unsafe { write(sources(), &layout, 1, &mut block[start..], None) });
    });
    let mut flat = vec![0; 128 << 20];
    group.bench_function("memcpy", |b| {
        b.iter(|| {
            for (target, source) in flat.chunks_mut(1 << 20).zip(black_box(&storages)) {
                target.copy_from_slice(source);
            }
        });
    });
}

fn copying(c: &mut Criterion) {
    let mut group = c.benchmark_group("gather/copy");
    group.sample_size(20);
    let storages = vec![vec![7; 16 << 20]; 4];
    let pieces = regions(&storages);
    let nbytes = 64 << 20;
    assert!(is_contiguous(&pieces, nbytes).is_ok());
    group.throughput(Throughput::Bytes(nbytes));
    group.bench_function("block", |b| {
        // SAFETY: the storages live and are only read; their length was checked.
        b.iter(|| unsafe { copy(black_box(&pieces), nbytes) });
    });
    group.bench_function("memcpy", |b| b.iter(|| black_box(&storages).concat()));
}

criterion_group!(benches, writing, packing, copying);
criterion_main!(benches);
