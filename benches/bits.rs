//! Speed of the bit packer on one core, every width and backend, beside the crates fastlanes and bitpacking.
//!
//! All buffers lie in the first-level cache. The others' layouts are their own (interleaved, least significant bit first, blocks of 128,
//! 256 or 1,024 values), and bitpacking and one half of fastlanes write 32-bit integers, half the bytes of ours; the best of all of them
//! counts. After criterion's lines a table follows, which `BITS_CSV=FILE` also writes as CSV. Rates are the best sample of each.

#![expect(missing_docs, reason = "criterion_group makes a public function")]

use std::fmt::Write as _;
use std::hint::black_box;
use std::time::{Duration, Instant};

use bitpacking::{BitPacker, BitPacker4x, BitPacker8x};
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime};
use distillkit_codec::{Backend, bits};
use fastlanes::BitPacking;

const COUNT: usize = 1024;

/// One measured rate: `pack` or `unpack`, who, values a second.
struct Rate {
    work: &'static str,
    width: u32,
    who: &'static str,
    values_per_second: f64,
}

struct Bench<'a> {
    group: BenchmarkGroup<'a, WallTime>,
    rates: Vec<Rate>,
}

impl Bench<'_> {
    fn measure(&mut self, work: &'static str, width: u32, who: &'static str, mut run: impl FnMut()) {
        let mut best = f64::INFINITY;
        self.group.bench_function(format!("{work} {width} {who}"), |bencher| {
            bencher.iter_custom(|iterations| {
                let start = Instant::now();
                (0..iterations).for_each(|_| run());
                let time = start.elapsed();
                best = best.min(time.as_secs_f64() / iterations as f64);
                time
            });
        });
        self.rates.push(Rate { work, width, who, values_per_second: COUNT as f64 / best });
    }

    fn ours(&mut self, width: u32, values: &[u64]) {
        for backend in Backend::available() {
            let mut packed = vec![0; bits::packed_len(COUNT, width)];
            let mut back = vec![0; COUNT];
            bits::pack_on(backend, values, width, &mut packed).expect("packs");
            bits::unpack_on(backend, &packed, width, &mut back).expect("unpacks");
            assert_eq!(back, values, "{} {width}", backend.name());
            self.measure("pack", width, backend.name(), || {
                bits::pack_on(backend, black_box(values), width, black_box(&mut packed)).expect("packs");
            });
            self.measure("unpack", width, backend.name(), || {
                bits::unpack_on(backend, black_box(&packed), width, black_box(&mut back)).expect("unpacks");
            });
        }
    }

    fn fastlanes<T: BitPacking + Copy + Default + PartialEq + std::fmt::Debug>(&mut self, who: &'static str, width: u32, values: &[T]) {
        let mut packed = vec![T::default(); 128 * width as usize / size_of::<T>()];
        let mut back = vec![T::default(); COUNT];
        let w = width as usize;
        // SAFETY: 1,024 values and 128·width bytes, as the crate asks.
        unsafe {
            T::unchecked_pack(w, values, &mut packed);
            T::unchecked_unpack(w, &packed, &mut back);
        }
        assert_eq!(back, values, "{who} {width}");
        // SAFETY: as above.
        self.measure("pack", width, who, || unsafe { T::unchecked_pack(w, black_box(values), black_box(&mut packed)) });
        // SAFETY: as above.
        self.measure("unpack", width, who, || unsafe { T::unchecked_unpack(w, black_box(&packed), black_box(&mut back)) });
    }

    fn bitpacking<P: BitPacker>(&mut self, of: P, who: &'static str, width: u8, values: &[u32]) {
        let block = P::compressed_block_size(width);
        let mut packed = vec![0u8; block * COUNT / P::BLOCK_LEN];
        let mut back = vec![0; COUNT];
        let pack = |values: &[u32], packed: &mut [u8]| {
            for (values, packed) in values.chunks_exact(P::BLOCK_LEN).zip(packed.chunks_exact_mut(block)) {
                of.compress(values, packed, width);
            }
        };
        let unpack = |packed: &[u8], values: &mut [u32]| {
            for (values, packed) in values.chunks_exact_mut(P::BLOCK_LEN).zip(packed.chunks_exact(block)) {
                of.decompress(packed, values, width);
            }
        };
        pack(values, &mut packed);
        unpack(&packed, &mut back);
        assert_eq!(back, values, "{who} {width}");
        self.measure("pack", u32::from(width), who, || pack(black_box(values), black_box(&mut packed)));
        self.measure("unpack", u32::from(width), who, || unpack(black_box(&packed), black_box(&mut back)));
    }

    fn rate(&self, work: &str, width: u32, who: &str) -> Option<f64> {
        self.rates.iter().find(|rate| rate.work == work && rate.width == width && rate.who == who).map(|rate| rate.values_per_second)
    }

    /// One line per work and width: our backends, the best of the others, and by how much that is faster than our best.
    fn table(&self) -> String {
        let backends = Backend::available();
        let names: Vec<&str> = backends.iter().map(|backend| backend.name()).collect();
        let mut text = format!("work,width,{},best_other,best_other_name,other_to_ours\n", names.join(","));
        for work in ["pack", "unpack"] {
            for width in 1..=64 {
                let ours: Vec<f64> = backends.iter().filter_map(|backend| self.rate(work, width, backend.name())).collect();
                let others = ["fastlanes u64", "fastlanes u32", "bitpacking 8x", "bitpacking 4x"];
                let others = others.into_iter().filter_map(|who| Some((who, self.rate(work, width, who)?)));
                let Some((who, other)) = others.max_by(|a, b| a.1.total_cmp(&b.1)) else { continue };
                let best = ours.iter().copied().fold(0.0, f64::max);
                let ours: Vec<String> = ours.iter().map(|rate| format!("{rate:.3e}")).collect();
                writeln!(text, "{work},{width},{},{other:.3e},{who},{:.2}", ours.join(","), other / best).expect("a string");
            }
        }
        text
    }
}

fn packing(c: &mut Criterion) {
    let mut group = c.benchmark_group("bits");
    group.throughput(Throughput::Elements(COUNT as u64));
    group.warm_up_time(Duration::from_millis(10)).measurement_time(Duration::from_millis(50)).sample_size(10).nresamples(1000);
    let mut bench = Bench { group, rates: Vec::new() };
    for width in 1..=64 {
        let values: Vec<u64> = (1..=COUNT as u64).map(|i| i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (64 - width)).collect();
        bench.ours(width, &values);
        bench.fastlanes("fastlanes u64", width, &values);
        if width <= 32 {
            let narrow: Vec<u32> = values.iter().map(|&value| value as u32).collect();
            bench.fastlanes("fastlanes u32", width, &narrow);
            bench.bitpacking(BitPacker8x::new(), "bitpacking 8x", width as u8, &narrow);
            bench.bitpacking(BitPacker4x::new(), "bitpacking 4x", width as u8, &narrow);
        }
    }
    let table = bench.table();
    bench.group.finish();
    if !std::env::args().any(|argument| argument == "--test") {
        report(&table);
    }
}

#[expect(clippy::print_stdout, reason = "a bench talks to its user")]
fn report(table: &str) {
    println!("{}", table.replace(',', "\t"));
    if let Ok(path) = std::env::var("BITS_CSV") {
        std::fs::write(&path, table).expect("the CSV can be written");
    }
}

criterion_group!(benches, packing);
criterion_main!(benches);
