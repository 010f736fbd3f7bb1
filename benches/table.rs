//! Encodes the offset table, and decodes it with all its checks.
#![allow(missing_docs)] // the macros of criterion

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ray_zerocopy::format::dtype::Dtype;
use ray_zerocopy::format::layout::Layout;
use ray_zerocopy::format::table::{Table, fingerprint};
use ray_zerocopy::format::view::{Dims, Flags, View};

fn table(count: usize) -> Table {
    let layout = Layout::plan((0..count).map(|_| 4 * 768 * 768)).unwrap();
    let view = |span| View {
        span,
        dtype: Dtype::Float32,
        flags: Flags::PARAMETER,
        offset: 0,
        shape: Dims::from_slice(&[768, 768]),
        stride: Dims::from_slice(&[768, 1]),
    };
    Table::new(&layout, (0..count).map(view).collect()).unwrap()
}

fn encode_and_decode(c: &mut Criterion) {
    let mut group = c.benchmark_group("table");
    for count in [200, 1_000, 5_000] {
        let table = table(count);
        let bytes = table.encode();
        group.throughput(Throughput::Elements(count as u64));
        group.bench_function(BenchmarkId::new("encode", count), |b| {
            b.iter(|| black_box(&table).encode());
        });
        group.bench_function(BenchmarkId::new("decode", count), |b| {
            b.iter(|| Table::decode(black_box(&bytes)));
        });
        group.bench_function(BenchmarkId::new("fingerprint", count), |b| {
            b.iter(|| fingerprint(black_box(&bytes)));
        });
    }
}

criterion_group!(benches, encode_and_decode);
criterion_main!(benches);
