//! Plans the layout of many storages.
#![allow(missing_docs)] // the macros of criterion

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ray_zerocopy::format::layout::Layout;

/// Large matrices and small vectors alternate, as in a transformer.
fn storages(count: usize) -> Vec<u64> {
    (0..count).map(|i| if i % 2 == 0 { 2_359_296 } else { 3_072 }).collect()
}

fn plan(c: &mut Criterion) {
    let mut group = c.benchmark_group("layout/plan");
    for count in [200, 1_000, 5_000] {
        let storages = storages(count);
        group.throughput(Throughput::Elements(count as u64));
        group.bench_with_input(BenchmarkId::from_parameter(count), &storages, |b, storages| {
            b.iter(|| Layout::plan(black_box(storages).iter().copied()));
        });
    }
}

criterion_group!(benches, plan);
criterion_main!(benches);
