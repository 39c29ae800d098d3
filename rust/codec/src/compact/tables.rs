//! Code tables: how likely each symbol is, and the automata that read and write symbols by it.
//!
//! The code is an asymmetric numeral system in its table form (tANS): a state of [`SLOTS_LOG`] bits
//! stands for a symbol, and the bits that follow for the next state.

use super::numbers::{ESCAPE, ESCAPE_BITS, Kind, SYMBOLS};

/// The logarithm of [`SLOTS`].
pub const SLOTS_LOG: u32 = 8;
/// The sum of a table's frequencies.
pub const SLOTS: usize = 1 << SLOTS_LOG;
/// Slots between two of a symbol; odd, so that every slot is met.
const SPREAD: usize = (SLOTS >> 1) + (SLOTS >> 3) + 3;

/// Frequencies of the symbols: they sum to [`SLOTS`], and the escape has at least one. A number
/// whose symbol has none is written as an escape.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Table(pub [u16; SYMBOLS]);

impl Table {
    /// The table that codes symbols that occurred this often in the fewest bits.
    #[must_use]
    pub fn from_counts(counts: &[u64; SYMBOLS], kind: Kind) -> Self {
        let total: u64 = counts.iter().sum();
        let mut table = [0; SYMBOLS];
        table[ESCAPE] = 1;
        if total == 0 {
            table[0] += SLOTS as u16 - 1;
            return Self(table);
        }
        let mut counts = counts.map(|count| count as f64);
        let mut left = SLOTS - 1;
        for symbol in 0..ESCAPE {
            let count = counts[symbol];
            // A symbol that is rarer than this costs more by its slot than by escapes.
            let share = count / total as f64 * SLOTS as f64;
            let bits = f64::from(ESCAPE_BITS - kind.extra_bits(symbol).min(ESCAPE_BITS));
            if count == 0.0 || !kind.is_used(symbol) || share * bits < 1.5 {
                counts[ESCAPE] += count;
                counts[symbol] = 0.0;
                continue;
            }
            table[symbol] = (share as usize).clamp(1, left.max(1)) as u16;
        }
        left += 1;
        let mut used: usize = table.iter().map(|&slots| usize::from(slots)).sum();
        // The next slot goes where it saves most, or is taken where it costs least.
        let saved = |symbol: usize, slots: u16| {
            counts[symbol] * libm::log2(f64::from(slots + 1) / f64::from(slots))
        };
        while used < left {
            let best = (0..SYMBOLS)
                .filter(|&symbol| table[symbol] > 0)
                .max_by(|&a, &b| saved(a, table[a]).total_cmp(&saved(b, table[b])));
            table[best.unwrap_or(ESCAPE)] += 1;
            used += 1;
        }
        while used > left {
            let best = (0..SYMBOLS)
                .filter(|&symbol| table[symbol] > 1)
                .min_by(|&a, &b| saved(a, table[a] - 1).total_cmp(&saved(b, table[b] - 1)));
            table[best.unwrap_or(ESCAPE)] -= 1;
            used -= 1;
        }
        Self(table)
    }

    /// Why it is no table, or nothing.
    pub(super) fn fault(&self, kind: Option<Kind>) -> Option<String> {
        let total: u32 = self.0.iter().map(|&slots| u32::from(slots)).sum();
        if total != SLOTS as u32 {
            return Some(format!("its frequencies sum to {total}, expected {SLOTS}"));
        }
        if self.0[ESCAPE] == 0 {
            return Some("it has no escape".to_owned());
        }
        let unknown = kind.and_then(|kind| {
            (0..SYMBOLS).find(|&symbol| self.0[symbol] > 0 && !kind.is_used(symbol))
        });
        unknown.map(|symbol| format!("it has symbol {symbol}, which no number has"))
    }

    /// The symbol that a number is written with.
    #[must_use]
    #[inline]
    pub fn symbol(&self, number: u32, kind: Kind) -> usize {
        let symbol = kind.symbol(number);
        if self.0[symbol] > 0 { symbol } else { ESCAPE }
    }

    /// Bits of each symbol, its extra bits included; those of an escape for symbols without a slot.
    #[must_use]
    pub fn costs(&self, kind: Kind) -> [f32; SYMBOLS] {
        let bits = |symbol: usize| {
            let slots = f64::from(self.0[symbol]);
            (f64::from(SLOTS_LOG) - libm::log2(slots)) as f32
                + kind.extra_bits(symbol).min(ESCAPE_BITS) as f32
        };
        std::array::from_fn(|symbol| if self.0[symbol] > 0 { bits(symbol) } else { bits(ESCAPE) })
    }

    /// The symbol of every state.
    fn spread(&self) -> [u8; SLOTS] {
        let mut symbols = [0; SLOTS];
        let mut slot = 0;
        for (symbol, &slots) in self.0.iter().enumerate() {
            for _ in 0..slots {
                symbols[slot] = symbol as u8;
                slot = (slot + SPREAD) % SLOTS;
            }
        }
        symbols
    }

    /// The entries of a decoder, one a state.
    pub(super) fn entries(&self, kind: Kind) -> [Entry; SLOTS] {
        let mut next = self.0.map(u32::from);
        self.spread().map(|symbol| {
            let state = next[usize::from(symbol)];
            next[usize::from(symbol)] += 1;
            let bits = SLOTS_LOG - state.ilog2();
            let base = (state << bits) - SLOTS as u32;
            Entry::new(base, bits, usize::from(symbol), kind)
        })
    }

    /// The automaton that writes.
    pub(super) fn writer(&self, kind: Kind) -> Writer {
        let mut symbols = [SymbolWriter::default(); SYMBOLS];
        let mut starts = [0; SYMBOLS];
        let mut total = 0;
        for (symbol, &slots) in self.0.iter().enumerate().filter(|(_, slots)| **slots > 0) {
            let most = SLOTS_LOG - u32::from(slots).ilog2();
            let extra = if kind.is_used(symbol) { kind.extra_bits(symbol) } else { 0 };
            symbols[symbol] = SymbolWriter {
                bits: (most << 16).wrapping_sub(u32::from(slots) << most),
                first: u16::wrapping_sub(total, slots),
                extra: extra as u16,
            };
            starts[symbol] = total;
            total += slots;
        }
        let mut states = [0; SLOTS];
        for (slot, symbol) in self.spread().into_iter().enumerate() {
            let place = &mut starts[usize::from(symbol)];
            states[usize::from(*place)] = slot as u16;
            *place += 1;
        }
        for (symbol, slots) in self.0.iter().enumerate() {
            if *slots == 0 {
                symbols[symbol] = symbols[ESCAPE];
            }
        }
        Writer { symbols, states }
    }
}

/// What a state means: from the lowest bit on the next state's base ([`SLOTS_LOG`] bits), how many
/// bits are added to it ([`Entry::COUNT`]), how many extra bits there are ([`Entry::COUNT`]), and the
/// first binary digits of the number, those before the extra bits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(transparent)]
pub(super) struct Entry(pub(super) u32);

impl Entry {
    /// Bits of each of the two counts.
    pub(super) const COUNT: u32 = 5;

    const fn new(base: u32, bits: u32, symbol: usize, kind: Kind) -> Self {
        let extra = kind.extra_bits(symbol);
        let lead = kind.base(symbol) >> extra;
        Self(base | (bits | (extra | lead << Self::COUNT) << Self::COUNT) << SLOTS_LOG)
    }

    #[inline(always)]
    pub(super) const fn base(self) -> u32 {
        self.0 % SLOTS as u32
    }

    #[inline(always)]
    pub(super) const fn bits(self) -> u32 {
        self.0 >> SLOTS_LOG & ((1 << Self::COUNT) - 1)
    }

    #[inline(always)]
    pub(super) const fn extra(self) -> u32 {
        self.0 >> (SLOTS_LOG + Self::COUNT) & ((1 << Self::COUNT) - 1)
    }

    #[inline(always)]
    pub(super) const fn lead(self) -> u32 {
        self.0 >> (SLOTS_LOG + 2 * Self::COUNT)
    }
}

/// Writes symbols of a table, last one first.
#[derive(Debug, Clone)]
pub(super) struct Writer {
    /// By symbol; those without a slot are written as an escape.
    symbols: [SymbolWriter; SYMBOLS],
    states: [u16; SLOTS],
}

/// How a symbol is written in a state.
#[derive(Debug, Clone, Copy, Default)]
struct SymbolWriter {
    /// Added to the state and [`SLOTS`], the bits to write are above the lower 16.
    bits: u32,
    /// Added to what is left of the state and [`SLOTS`] without them: the place in `states`.
    first: u16,
    extra: u16,
}

impl Writer {
    /// Changes the state to one that means the number's symbol, after which `state` comes again.
    /// Returns the bits to write, and how many.
    #[inline(always)]
    pub(super) fn write(&self, state: &mut u32, number: u32, kind: Kind) -> (u64, u32) {
        let symbol = self.symbols[kind.symbol(number) % SYMBOLS];
        let full = *state + SLOTS as u32;
        let bits = full.wrapping_add(symbol.bits) >> 16;
        let low = full & ((1 << bits) - 1);
        let place = ((full >> bits) as u16).wrapping_add(symbol.first);
        *state = u32::from(self.states[usize::from(place) % SLOTS]);
        let extra = u32::from(symbol.extra);
        let rest = u64::from(number & ((1 << extra) - 1));
        // Bases are multiples of their symbols' range, so the low bits are what is left.
        (u64::from(low) | rest << bits, bits + extra)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(numbers: &[u32], kind: Kind) -> [u64; SYMBOLS] {
        let mut counts = [0; SYMBOLS];
        for &number in numbers {
            counts[kind.symbol(number)] += 1;
        }
        counts
    }

    fn numbers() -> Vec<u32> {
        let mut state = 7u32;
        (0..3000)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) >> ((state >> 3) % 25)
            })
            .collect()
    }

    #[test]
    fn what_is_written_is_read() {
        let numbers = numbers();
        for kind in [Kind::Gap, Kind::Other] {
            for known in [0, 1, 30, numbers.len()] {
                let table = Table::from_counts(&counts(&numbers[..known], kind), kind);
                assert_eq!(table.fault(Some(kind)), None);
                let (writer, entries) = (table.writer(kind), table.entries(kind));
                let mut state = 0;
                let mut written: Vec<_> = numbers
                    .iter()
                    .rev()
                    .map(|&number| writer.write(&mut state, number, kind))
                    .collect();
                for &number in &numbers {
                    let (bits, count) = written.pop().expect("as many as numbers");
                    let entry = entries[state as usize];
                    assert_eq!(entry.bits() + entry.extra(), count);
                    state = entry.base() + (bits as u32 & ((1 << entry.bits()) - 1));
                    let low = (bits >> entry.bits()) as u32;
                    assert_eq!((entry.lead() << entry.extra()) + low, number);
                }
                assert_eq!(state, 0);
            }
        }
    }

    #[test]
    fn a_table_is_close_to_the_entropy() {
        let kind = Kind::Other;
        let counts = counts(&numbers(), kind);
        let costs = Table::from_counts(&counts, kind).costs(kind);
        let total: u64 = counts.iter().sum();
        let (mut bits, mut entropy) = (0.0, 0.0);
        for (symbol, &count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
            let share = count as f64 / total as f64;
            bits += share * f64::from(costs[symbol]);
            entropy += share * (f64::from(kind.extra_bits(symbol)) - share.log2());
        }
        assert!(bits < entropy + 0.01, "{bits} bits a number, {entropy} at best");
    }
}
