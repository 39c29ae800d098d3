//! Numbers as a symbol and extra bits, and buckets of numbers: the alphabets of all code tables.

/// Symbols of a table, the escape included.
pub const SYMBOLS: usize = 64;
/// The symbol after which a number follows in [`ESCAPE_BITS`] bits.
pub const ESCAPE: usize = SYMBOLS - 1;
/// Bits of an escaped number.
pub const ESCAPE_BITS: u32 = 24;
/// Numbers below this are a symbol each.
const DIRECT: u32 = 16;

static GAP_SYMBOLS: [u8; 1024] = Kind::Gap.symbols();
static OTHER_SYMBOLS: [u8; 1024] = Kind::Other.symbols();

/// What a number counts: decides how many symbols an octave has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Ids left out between two stored ones: two symbols an octave.
    Gap,
    /// Everything else: four symbols an octave, up to those that need an escape.
    Other,
}

impl Kind {
    /// The logarithm of the symbols an octave.
    const fn sub_bits(self) -> u32 {
        match self {
            Self::Gap => 1,
            Self::Other => 2,
        }
    }

    /// The symbol of a number below 2²⁴.
    #[must_use]
    #[inline(always)]
    pub fn symbol(self, number: u32) -> usize {
        let known = if self == Self::Gap { &GAP_SYMBOLS } else { &OTHER_SYMBOLS };
        known.get(number as usize).map_or_else(|| self.find(number), |&symbol| symbol.into())
    }

    const fn find(self, number: u32) -> usize {
        if number < DIRECT {
            return number as usize;
        }
        let sub = self.sub_bits();
        let octave = number.ilog2();
        let part = (number >> (octave - sub)) & ((1 << sub) - 1);
        let symbol = (DIRECT + ((octave - 4) << sub) + part) as usize;
        if symbol < ESCAPE { symbol } else { ESCAPE }
    }

    /// The symbols of small numbers: a table knows them sooner than a comparison that is guessed
    /// wrong.
    const fn symbols(self) -> [u8; 1024] {
        let mut symbols = [0; 1024];
        let mut number = 0;
        while number < symbols.len() {
            symbols[number] = self.find(number as u32) as u8;
            number += 1;
        }
        symbols
    }

    /// The extra bits after a symbol.
    #[must_use]
    pub const fn extra_bits(self, symbol: usize) -> u32 {
        let symbol = symbol as u32;
        if symbol == ESCAPE as u32 {
            ESCAPE_BITS
        } else if symbol < DIRECT {
            0
        } else {
            ((symbol - DIRECT) >> self.sub_bits()) + 4 - self.sub_bits()
        }
    }

    /// The least number of a symbol; 0 for the escape.
    #[must_use]
    pub const fn base(self, symbol: usize) -> u32 {
        let sub = self.sub_bits();
        let symbol = symbol as u32;
        if symbol == ESCAPE as u32 {
            return 0;
        }
        if symbol < DIRECT {
            return symbol;
        }
        let octave = ((symbol - DIRECT) >> sub) + 4;
        let part = (symbol - DIRECT) & ((1 << sub) - 1);
        (1 << octave) + (part << (octave - sub))
    }

    /// Whether a number below 2²⁴ has the symbol.
    pub(super) const fn is_used(self, symbol: usize) -> bool {
        symbol <= self.find((1 << ESCAPE_BITS) - 1) || symbol == ESCAPE
    }
}

/// Bucket of a number: 0, 1, 2, 3, then two an octave (4–5, 6–7, 8–11, 12–15, …).
#[must_use]
#[inline(always)]
pub const fn bucket(number: u32) -> usize {
    // Below 2 the number itself; otherwise its two highest bits are 2 or 3.
    let shift = (number | 2).ilog2() - 1;
    (2 * shift + (number >> shift)) as usize
}

/// [`bucket`] of a number above 0 and at most 2²⁴, by the exponent and the highest bit of the
/// fraction of a float, which is quick for many numbers.
#[must_use]
#[inline(always)]
pub(super) const fn float_bucket(number: u32) -> u8 {
    let bits = (number as i32 as f32).to_bits() >> 22;
    let bucket = bits.wrapping_sub(2 * 127) as u8;
    if bucket == 0 { 1 } else { bucket }
}

/// The least number of a bucket.
#[must_use]
pub const fn bucket_start(bucket: usize) -> u32 {
    if bucket < 4 { bucket as u32 } else { (2 + bucket as u32 % 2) << (bucket / 2 - 1) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_its_symbols_base_and_extra_bits() {
        for kind in [Kind::Gap, Kind::Other] {
            let octaves =
                (4..24).flat_map(|octave| [(1 << octave) - 1, 1 << octave, 3 << (octave - 1)]);
            for number in (0..5000).chain(octaves) {
                let symbol = kind.symbol(number);
                let base = kind.base(symbol);
                assert!(base <= number && u64::from(number - base) < 1 << kind.extra_bits(symbol));
                assert!(
                    number + 1 == 1 << ESCAPE_BITS
                        || kind.symbol(number) <= kind.symbol(number + 1)
                );
            }
        }
    }

    #[test]
    fn buckets_are_two_an_octave() {
        let of = |numbers: &[u32]| numbers.iter().map(|&number| bucket(number)).collect::<Vec<_>>();
        assert_eq!(
            of(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 15, 16]),
            [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8]
        );
        assert_eq!(bucket(1 << 24), 48);
        for number in 1..=48 {
            let start = bucket_start(number);
            assert_eq!([bucket(start - 1), bucket(start)], [number - 1, number]);
            assert_eq!(usize::from(float_bucket(start)), number);
            if number > 1 {
                assert_eq!(usize::from(float_bucket(start - 1)), number - 1);
            }
        }
    }
}
