//! Speed of the bit packer on one core, every width and backend, beside the crates fastlanes and bitpacking.
//!
//! All buffers lie in the first-level cache and begin with a cache line. The others' layouts are their own (interleaved, least significant
//! bit first, blocks of 128, 256 or 1,024 values), and bitpacking and one half of fastlanes take and return 32-bit integers, half the bytes
//! of ours; the best of all of them counts, in values a second. Every backend must write the same bytes and every packer return the values
//! before its time counts. After criterion's lines a table follows, which `BITS_CSV=FILE` also writes as CSV. Rates are the best sample of
//! each.

#![expect(missing_docs, reason = "criterion_group makes a public function")]

use std::fmt::Write as _;
use std::hint::black_box;
use std::ops::{Deref, DerefMut};
use std::time::{Duration, Instant};

use bitpacking::{BitPacker, BitPacker4x, BitPacker8x};
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime};
use distillkit_codec::{Backend, bits};
use fastlanes::BitPacking;

const COUNT: usize = 1024;

/// `count` zeros from a cache line's border on: a store that lies across two lines takes twice the time, and where an allocation begins
/// is chance.
struct Buffer<T> {
    memory: Vec<T>,
    start: usize,
    count: usize,
}

impl<T: Copy + Default> Buffer<T> {
    const LINE: usize = 64;

    fn new(count: usize) -> Self {
        let memory = vec![T::default(); count + Self::LINE / size_of::<T>()];
        let start = memory.as_ptr().align_offset(Self::LINE);
        Self { memory, start, count }
    }

    fn of(values: impl ExactSizeIterator<Item = T>) -> Self {
        let mut buffer = Self::new(values.len());
        buffer.iter_mut().zip(values).for_each(|(place, value)| *place = value);
        buffer
    }
}

impl<T> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.memory[self.start..][..self.count]
    }
}

impl<T> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.memory[self.start..][..self.count]
    }
}

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
        let mut portable = vec![0; bits::packed_len(COUNT, width)];
        bits::pack_on(Backend::Portable, values, width, &mut portable).expect("packs");
        for backend in Backend::available() {
            let (mut packed, mut back) = (Buffer::new(portable.len()), Buffer::new(COUNT));
            bits::pack_on(backend, values, width, &mut packed).expect("packs");
            bits::unpack_on(backend, &packed, width, &mut back).expect("unpacks");
            assert_eq!((&packed[..], &back[..]), (&portable[..], values), "{} {width}", backend.name());
            self.measure("pack", width, backend.name(), || {
                bits::pack_on(backend, black_box(values), width, black_box(&mut packed)).expect("packs");
            });
            self.measure("unpack", width, backend.name(), || {
                bits::unpack_on(backend, black_box(&packed), width, black_box(&mut back)).expect("unpacks");
            });
        }
    }

    fn fastlanes<T: BitPacking + Copy + Default + PartialEq + std::fmt::Debug>(&mut self, who: &'static str, width: u32, values: &[T]) {
        let mut packed = Buffer::new(128 * width as usize / size_of::<T>());
        let mut back = Buffer::new(COUNT);
        let w = width as usize;
        // SAFETY: 1,024 values and 128·width bytes, as the crate asks.
        unsafe {
            T::unchecked_pack(w, values, &mut packed);
            T::unchecked_unpack(w, &packed, &mut back);
        }
        assert_eq!(&back[..], values, "{who} {width}");
        // SAFETY: as above.
        self.measure("pack", width, who, || unsafe { T::unchecked_pack(w, black_box(values), black_box(&mut packed)) });
        // SAFETY: as above.
        self.measure("unpack", width, who, || unsafe { T::unchecked_unpack(w, black_box(&packed), black_box(&mut back)) });
    }

    fn bitpacking<P: BitPacker>(&mut self, of: P, who: &'static str, width: u8, values: &[u32]) {
        let block = P::compressed_block_size(width);
        let mut packed = Buffer::new(block * COUNT / P::BLOCK_LEN);
        let mut back = Buffer::new(COUNT);
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
        assert_eq!(&back[..], values, "{who} {width}");
        self.measure("pack", u32::from(width), who, || pack(black_box(values), black_box(&mut packed)));
        self.measure("unpack", u32::from(width), who, || unpack(black_box(&packed), black_box(&mut back)));
    }

    fn rate(&self, work: &str, width: u32, who: &str) -> Option<f64> {
        self.rates.iter().find(|rate| rate.work == work && rate.width == width && rate.who == who).map(|rate| rate.values_per_second)
    }

    /// One line per work and width: our backends, the best of the others and how wide its values are, and by how much it is faster than our
    /// best, in values and in bytes read and written.
    fn table(&self) -> String {
        let backends = Backend::available();
        let names: Vec<&str> = backends.iter().map(|backend| backend.name()).collect();
        let others_are = "best_other,best_other_name,best_other_value_bytes,other_to_ours,other_to_ours_bytes";
        let mut text = format!("work,width,{},{others_are},machine,version\n", names.join(","));
        let (machine, version) = (machine(), env!("CARGO_PKG_VERSION"));
        for work in ["pack", "unpack"] {
            for width in 1..=64 {
                let ours: Vec<f64> = backends.iter().filter_map(|backend| self.rate(work, width, backend.name())).collect();
                let others = [("fastlanes u64", 8), ("fastlanes u32", 4), ("bitpacking 8x", 4), ("bitpacking 4x", 4)];
                let others = others.into_iter().filter_map(|(who, value_bytes)| Some((who, value_bytes, self.rate(work, width, who)?)));
                let Some((who, value_bytes, other)) = others.max_by(|a, b| a.2.total_cmp(&b.2)) else { continue };
                let ratio = other / ours.iter().copied().fold(0.0, f64::max);
                let moved = |value_bytes: u32| f64::from(value_bytes) + f64::from(width) / 8.0;
                let bytes_ratio = ratio * moved(value_bytes) / moved(8);
                let ours: Vec<String> = ours.iter().map(|rate| format!("{rate:.3e}")).collect();
                let ours = ours.join(",");
                writeln!(text, "{work},{width},{ours},{other:.3e},{who},{value_bytes},{ratio:.2},{bytes_ratio:.2},\"{machine}\",{version}")
                    .expect("a string");
            }
        }
        text
    }
}

/// The processor and its cores, as the other tables have them.
fn machine() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':')).map(|(_, name)| name.trim());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{}, {cores} core{}", name.unwrap_or(std::env::consts::ARCH), if cores > 1 { "s" } else { "" })
}

fn packing(c: &mut Criterion) {
    let mut group = c.benchmark_group("bits");
    group.throughput(Throughput::Elements(COUNT as u64));
    group.warm_up_time(Duration::from_millis(10)).measurement_time(Duration::from_millis(50)).sample_size(10).nresamples(1000);
    let mut bench = Bench { group, rates: Vec::new() };
    for width in 1..=64 {
        let values = Buffer::of((0..COUNT).map(|i| (i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (64 - width)));
        bench.ours(width, &values);
        bench.fastlanes("fastlanes u64", width, &values);
        if width <= 32 {
            let narrow = Buffer::of(values.iter().map(|&value| value as u32));
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
    for line in table.lines() {
        // Without the last two columns, which are the same everywhere.
        println!("{}", line.split(',').take(7 + Backend::available().len()).collect::<Vec<_>>().join("\t"));
    }
    if let Ok(path) = std::env::var("BITS_CSV") {
        std::fs::write(&path, table).expect("the CSV can be written");
    }
}

criterion_group!(benches, packing);
criterion_main!(benches);
