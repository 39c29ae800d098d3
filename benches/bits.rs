//! Speed of the bit packer on one core, every width and backend, beside the crates fastlanes and
//! bitpacking.
//!
//! Rates are values a second, of 32-bit integers (widths up to 32) and of 64-bit integers apart:
//! fastlanes packs both, bitpacking the former. All buffers lie in the first-level cache and begin
//! with a cache line. The others' layouts are their own (interleaved, least significant bit first,
//! blocks of 128, 256 or 1,024 values). Every backend must write the same bytes and every packer
//! return the values before its time counts. After criterion's lines a table follows, which
//! `BITS_CSV=FILE` also writes as CSV. Rates are the best sample of several rounds.

#![expect(missing_docs, reason = "criterion_group makes a public function")]

use std::fmt::{Debug, Write as _};
use std::hint::black_box;
use std::ops::{Deref, DerefMut};
use std::time::{Duration, Instant};

use bitpacking::{BitPacker, BitPacker4x, BitPacker8x};
use criterion::{
    BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime,
};
use distillkit_codec::Backend;
use distillkit_codec::bits::{self, Value};
use fastlanes::BitPacking;

const COUNT: usize = 1024;
/// Everything is measured this many times, a minute apart: what else the machine does would slow
/// some of it down.
const ROUNDS: usize = 3;

/// `count` zeros from a cache line's border on: a store that lies across two lines takes twice the
/// time, and where an allocation begins is chance.
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

/// One measured rate: `pack` or `unpack`, `u32` or `u64`, who, values a second.
struct Rate {
    work: &'static str,
    values: &'static str,
    width: u32,
    who: &'static str,
    values_per_second: f64,
}

struct Bench<'a> {
    group: BenchmarkGroup<'a, WallTime>,
    rates: Vec<Rate>,
}

impl Bench<'_> {
    fn measure<T>(
        &mut self,
        work: &'static str,
        width: u32,
        who: &'static str,
        mut run: impl FnMut(),
    ) {
        let values = std::any::type_name::<T>();
        let mut best = f64::INFINITY;
        self.group.bench_function(format!("{work} {width} of {values} {who}"), |bencher| {
            bencher.iter_custom(|iterations| {
                let start = Instant::now();
                (0..iterations).for_each(|_| run());
                let time = start.elapsed();
                best = best.min(time.as_secs_f64() / iterations as f64);
                time
            });
        });
        self.rates.push(Rate { work, values, width, who, values_per_second: COUNT as f64 / best });
    }

    fn ours<T: Value + Copy + Default + PartialEq + Debug>(&mut self, width: u32, values: &[T]) {
        let mut portable = vec![0; bits::packed_len(COUNT, width)];
        bits::pack_on(Backend::Portable, values, width, &mut portable).expect("packs");
        for backend in Backend::available() {
            let mut packed = Buffer::new(portable.len());
            let mut back = Buffer::<T>::new(COUNT);
            bits::pack_on(backend, values, width, &mut packed).expect("packs");
            bits::unpack_on(backend, &packed, width, &mut back).expect("unpacks");
            assert_eq!(
                (&packed[..], &back[..]),
                (&portable[..], values),
                "{} {width}",
                backend.name()
            );
            self.measure::<T>("pack", width, backend.name(), || {
                bits::pack_on(backend, black_box(values), width, black_box(&mut packed))
                    .expect("packs");
            });
            self.measure::<T>("unpack", width, backend.name(), || {
                bits::unpack_on(backend, black_box(&packed), width, black_box(&mut back))
                    .expect("unpacks");
            });
        }
    }

    fn fastlanes<T: BitPacking + Copy + Default + PartialEq + Debug>(
        &mut self,
        width: u32,
        values: &[T],
    ) {
        let who = "fastlanes";
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
        self.measure::<T>("pack", width, who, || unsafe {
            T::unchecked_pack(w, black_box(values), black_box(&mut packed));
        });
        // SAFETY: as above.
        self.measure::<T>("unpack", width, who, || unsafe {
            T::unchecked_unpack(w, black_box(&packed), black_box(&mut back));
        });
    }

    fn bitpacking<P: BitPacker>(&mut self, of: P, who: &'static str, width: u32, values: &[u32]) {
        let num_bits = width as u8;
        let block = P::compressed_block_size(num_bits);
        let mut packed = Buffer::new(block * COUNT / P::BLOCK_LEN);
        let mut back = Buffer::new(COUNT);
        let pack = |values: &[u32], packed: &mut [u8]| {
            for (values, packed) in
                values.chunks_exact(P::BLOCK_LEN).zip(packed.chunks_exact_mut(block))
            {
                of.compress(values, packed, num_bits);
            }
        };
        let unpack = |packed: &[u8], values: &mut [u32]| {
            for (values, packed) in
                values.chunks_exact_mut(P::BLOCK_LEN).zip(packed.chunks_exact(block))
            {
                of.decompress(packed, values, num_bits);
            }
        };
        pack(values, &mut packed);
        unpack(&packed, &mut back);
        assert_eq!(&back[..], values, "{who} {width}");
        self.measure::<u32>("pack", width, who, || pack(black_box(values), black_box(&mut packed)));
        self.measure::<u32>("unpack", width, who, || {
            unpack(black_box(&packed), black_box(&mut back));
        });
    }
}

/// One line per work, type of values and width: our backends, the best of the others, and how many
/// times as fast as our best it is.
fn table(rates: &[Rate]) -> String {
    let backends: Vec<&str> = Backend::available().into_iter().map(Backend::name).collect();
    let mut text = format!(
        "work,values,width,{},best_other,best_other_name,other_to_ours,machine,version\n",
        backends.join(",")
    );
    let machine = machine();
    let version = env!("CARGO_PKG_VERSION");
    for (work, values) in [("pack", "u32"), ("pack", "u64"), ("unpack", "u32"), ("unpack", "u64")] {
        for width in 1..=64 {
            let of_line = rates
                .iter()
                .filter(|rate| (rate.work, rate.values, rate.width) == (work, values, width));
            let (ours, others): (Vec<&Rate>, Vec<&Rate>) =
                of_line.partition(|rate| backends.contains(&rate.who));
            let (Some(our_best), Some(other)) =
                (best(ours.iter().copied()), best(others.into_iter()))
            else {
                continue;
            };
            let of_backend = |who| {
                best(ours.iter().copied().filter(|rate| rate.who == who))
                    .map_or(0.0, |rate| rate.values_per_second)
            };
            let ours: Vec<String> =
                backends.iter().map(|&who| format!("{:.3e}", of_backend(who))).collect();
            let ours = ours.join(",");
            let who = other.who;
            let other = other.values_per_second;
            let ratio = other / our_best.values_per_second;
            let rates = format!("{ours},{other:.3e},{who},{ratio:.2}");
            let line = format!("{work},{values},{width},{rates},\"{machine}\",{version}");
            writeln!(text, "{line}").expect("a string");
        }
    }
    text
}

fn best<'a>(rates: impl Iterator<Item = &'a Rate>) -> Option<&'a Rate> {
    rates.max_by(|a, b| a.values_per_second.total_cmp(&b.values_per_second))
}

/// The processor and its cores, as the other tables have them.
fn machine() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'))
        .map(|(_, name)| name.trim());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    format!(
        "{}, {cores} core{}",
        name.unwrap_or(std::env::consts::ARCH),
        if cores > 1 { "s" } else { "" }
    )
}

fn packing(c: &mut Criterion) {
    let mut rates = Vec::new();
    for round in 1..=ROUNDS {
        let mut group = c.benchmark_group(format!("bits, round {round}"));
        group.throughput(Throughput::Elements(COUNT as u64));
        group
            .warm_up_time(Duration::from_millis(10))
            .measurement_time(Duration::from_millis(45))
            .sample_size(20)
            .nresamples(1000);
        let mut bench = Bench { group, rates };
        for width in 1..=64 {
            let values = Buffer::of(
                (0..COUNT)
                    .map(|i| (i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (64 - width)),
            );
            bench.ours(width, &values);
            bench.fastlanes(width, &values);
            if width <= 32 {
                let narrow = Buffer::of(values.iter().map(|&value| value as u32));
                bench.ours(width, &narrow);
                bench.fastlanes(width, &narrow);
                bench.bitpacking(BitPacker8x::new(), "bitpacking 8x", width, &narrow);
                bench.bitpacking(BitPacker4x::new(), "bitpacking 4x", width, &narrow);
            }
        }
        rates = bench.rates;
    }
    if !std::env::args().any(|argument| argument == "--test") {
        report(&table(&rates));
    }
}

#[expect(clippy::print_stdout, reason = "a bench talks to its user")]
fn report(table: &str) {
    for line in table.lines() {
        // Without the last two columns, which are the same everywhere.
        println!(
            "{}",
            line.split(',').take(6 + Backend::available().len()).collect::<Vec<_>>().join("\t")
        );
    }
    if let Ok(path) = std::env::var("BITS_CSV") {
        std::fs::write(&path, table).expect("the CSV can be written");
    }
}

criterion_group!(benches, packing);
criterion_main!(benches);
