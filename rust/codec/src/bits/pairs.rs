//! Where two neighbouring values lie in 16 bytes: the tables of the instruction sets that permute bytes within 128 bits.

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
            let (pair, half) = (value / 2, value % 2);
            let start = 2 * pair * width / 8;
            let (byte, before) = (value * width / 8 - start, value * width % 8);
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
