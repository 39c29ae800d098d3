//! Where two or four neighbouring values lie in 16 bytes: the tables of the instruction sets that
//! permute bytes within 128 bits.

/// Eight values of one width in four pairs.
pub(super) struct Pairs {
    /// The byte that a pair's 16 bytes begin with.
    pub(super) start: [usize; 4],
    /// Per value, the eight bytes of those from its first bit on, the last of them first.
    pub(super) bytes: [[u8; 16]; 4],
    /// Per value, the bits after its last one in those bytes.
    pub(super) after: [[u64; 2]; 4],
}

impl Pairs {
    const fn new(width: usize) -> Self {
        let mut pairs = Self { start: [0; 4], bytes: [[0; 16]; 4], after: [[0; 2]; 4] };
        let mut value = 0;
        while value < 8 {
            let pair = value / 2;
            let half = value % 2;
            let start = 2 * pair * width / 8;
            let byte = value * width / 8 - start;
            let before = value * width % 8;
            pairs.start[pair] = start;
            pairs.after[pair][half] = 64u64.saturating_sub((width + before) as u64);
            let mut i = 0;
            while i < 8 {
                pairs.bytes[pair][8 * half + i] = (byte + 7 - i) as u8;
                i += 1;
            }
            value += 1;
        }
        pairs
    }

    /// The eight values from a byte border on, of a width that [`super::nine_bytes`] excludes.
    #[inline(always)]
    pub(super) fn of(width: u32) -> &'static Self {
        static PAIRS: [Pairs; 64] = {
            let mut pairs = [const { Pairs::new(64) }; 64];
            let mut width = 1;
            while width < 64 {
                pairs[width - 1] = Pairs::new(width);
                width += 1;
            }
            pairs
        };
        &PAIRS[width as usize - 1]
    }
}

/// Eight values of one width of at most 32 bits in two fours.
pub(super) struct Fours {
    /// The byte that the second four's 16 bytes begin with.
    pub(super) second: usize,
    /// Per value, the four bytes up to the one with its last bit, that one first. Those before the
    /// 16 bytes have numbers from 128 on, which permute as zeros; no bit of the value is in them.
    pub(super) last: [[u8; 16]; 2],
    /// The same for the four bytes before those.
    pub(super) before: [[u8; 16]; 2],
    /// Per value, the bits after its last one in its last byte.
    pub(super) after: [[u32; 4]; 2],
}

impl Fours {
    const fn new(width: usize) -> Self {
        let second = 4 * width / 8;
        let mut fours =
            Self { second, last: [[0; 16]; 2], before: [[0; 16]; 2], after: [[0; 4]; 2] };
        let mut value = 0;
        while value < 8 {
            let four = value / 4;
            let lane = value % 4;
            let end = (value + 1) * width - 1 - 8 * four * second;
            fours.after[four][lane] = 7 - end as u32 % 8;
            let mut i = 0;
            while i < 4 {
                fours.last[four][4 * lane + i] = (end / 8).wrapping_sub(i) as u8;
                fours.before[four][4 * lane + i] = (end / 8).wrapping_sub(4 + i) as u8;
                i += 1;
            }
            value += 1;
        }
        fours
    }

    /// The eight values from a byte border on, of a width of 1–32 bits.
    #[inline(always)]
    pub(super) fn of(width: u32) -> &'static Self {
        static FOURS: [Fours; 32] = {
            let mut fours = [const { Fours::new(32) }; 32];
            let mut width = 1;
            while width < 32 {
                fours[width - 1] = Fours::new(width);
                width += 1;
            }
            fours
        };
        &FOURS[width as usize - 1]
    }
}
