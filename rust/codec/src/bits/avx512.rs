//! Packing with AVX-512: byte permutes over whole registers (VBMI), double shifts (VBMI2), masked
//! loads and stores at the ends.

use std::arch::x86_64::{
    __m512i, _mm512_add_epi8, _mm512_add_epi64, _mm512_and_si512, _mm512_andnot_si512,
    _mm512_loadu_epi8, _mm512_loadu_epi64, _mm512_madd_epi16, _mm512_madd52lo_epu64,
    _mm512_maddubs_epi16, _mm512_mask_shuffle_epi8, _mm512_mask_shuffle_epi32,
    _mm512_mask_storeu_epi8, _mm512_mask_storeu_epi32, _mm512_mask_storeu_epi64,
    _mm512_maskz_loadu_epi8, _mm512_maskz_loadu_epi32, _mm512_maskz_loadu_epi64,
    _mm512_maskz_mov_epi32, _mm512_maskz_mov_epi64, _mm512_maskz_permutexvar_epi8,
    _mm512_max_epu32, _mm512_max_epu64, _mm512_mul_epu32, _mm512_mullo_epi16, _mm512_mullo_epi32,
    _mm512_or_si512, _mm512_packus_epi16, _mm512_packus_epi32, _mm512_permutexvar_epi8,
    _mm512_reduce_max_epu32, _mm512_reduce_max_epu64, _mm512_reduce_or_epi32,
    _mm512_reduce_or_epi64, _mm512_rolv_epi32, _mm512_rolv_epi64, _mm512_set1_epi8,
    _mm512_set1_epi16, _mm512_set1_epi32, _mm512_set1_epi64, _mm512_set4_epi32, _mm512_setr_epi32,
    _mm512_setr_epi64, _mm512_setzero_si512, _mm512_shldv_epi16, _mm512_shldv_epi64,
    _mm512_shrdv_epi32, _mm512_shuffle_epi8, _mm512_srli_epi32, _mm512_srli_epi64,
    _mm512_srlv_epi32, _mm512_srlv_epi64, _mm512_storeu_epi8, _mm512_storeu_epi64, _mm512_sub_epi8,
    _mm512_sub_epi32, _mm512_sub_epi64, _mm512_ternarylogic_epi64,
};
use std::marker::PhantomData;

use super::private::ValuesMut;
use super::{Value, five_bytes, max_value, nine_bytes};

/// The lowest `count` of 64 mask bits.
const fn low_bits(count: usize) -> u64 {
    if count >= 64 { u64::MAX } else { (1 << count) - 1 }
}

/// Loads the first 64 bytes; those after the end are zero.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn load_bytes(bytes: &[u8]) -> __m512i {
    if bytes.len() >= 64 {
        // SAFETY: the slice has 64 bytes.
        return unsafe { _mm512_loadu_epi8(bytes.as_ptr().cast()) };
    }
    // SAFETY: masked bytes are not accessed, and the others lie in the slice.
    unsafe { _mm512_maskz_loadu_epi8(low_bits(bytes.len()), bytes.as_ptr().cast()) }
}

/// Stores the first 64 bytes, or as many as there are.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn store_bytes(bytes: &mut [u8], vector: __m512i) {
    if bytes.len() >= 64 {
        // SAFETY: the slice has 64 bytes.
        return unsafe { _mm512_storeu_epi8(bytes.as_mut_ptr().cast(), vector) };
    }
    // SAFETY: masked bytes are not accessed, and the others lie in the slice.
    unsafe { _mm512_mask_storeu_epi8(bytes.as_mut_ptr().cast(), low_bits(bytes.len()), vector) }
}

/// Values of a register.
const fn lanes<V>() -> usize {
    64 / size_of::<V>()
}

/// Loads the first values; those after the end are zero.
#[inline]
#[target_feature(enable = "avx512f")]
fn load_values<V: Value>(values: &[V]) -> __m512i {
    if values.len() >= lanes::<V>() {
        // SAFETY: the slice has 64 bytes.
        return unsafe { _mm512_loadu_epi64(values.as_ptr().cast()) };
    }
    let present = low_bits(values.len());
    if size_of::<V>() == 4 {
        // SAFETY: masked values are not accessed, and the others lie in the slice.
        return unsafe { _mm512_maskz_loadu_epi32(present as u16, values.as_ptr().cast()) };
    }
    // SAFETY: as above.
    unsafe { _mm512_maskz_loadu_epi64(present as u8, values.as_ptr().cast()) }
}

/// Stores the first values of a register, or as many as there are.
#[inline]
#[target_feature(enable = "avx512f")]
fn store_values<V: Value>(values: &mut [V], vector: __m512i) {
    if values.len() >= lanes::<V>() {
        // SAFETY: the slice has 64 bytes.
        return unsafe { _mm512_storeu_epi64(values.as_mut_ptr().cast(), vector) };
    }
    let present = low_bits(values.len());
    if size_of::<V>() == 4 {
        // SAFETY: masked values are not accessed, and the others lie in the slice.
        unsafe { _mm512_mask_storeu_epi32(values.as_mut_ptr().cast(), present as u16, vector) };
        return;
    }
    // SAFETY: as above.
    unsafe { _mm512_mask_storeu_epi64(values.as_mut_ptr().cast(), present as u8, vector) }
}

/// Unpacks eight values from `width` bytes; `WIDE` if a value may touch nine.
#[derive(Clone, Copy)]
struct Unpacker<const WIDE: bool> {
    /// Per value, the indices of the eight bytes from its first bit on, the last of them first.
    bytes: __m512i,
    /// Per value, the bits before its first one in those bytes.
    before: __m512i,
    /// Per value, the bits after its last one in those bytes; with `WIDE` once the bits before are
    /// shifted away.
    after: __m512i,
    mask: __m512i,
}

impl<const WIDE: bool> Unpacker<WIDE> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn new(width: u32) -> Self {
        let (first, before) = places(width);
        let spare = _mm512_set1_epi64(64 - i64::from(width));
        Self {
            bytes: _mm512_add_epi8(first, _mm512_set1_epi64(0x0001_0203_0405_0607)),
            before,
            after: if WIDE { spare } else { _mm512_sub_epi64(spare, before) },
            mask: _mm512_set1_epi64(max_value(width) as i64),
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vbmi2")]
    fn values(&self, data: __m512i) -> __m512i {
        let head = _mm512_permutexvar_epi8(self.bytes, data);
        if WIDE {
            let ninth = _mm512_add_epi8(self.bytes, _mm512_set1_epi8(8));
            let ninth = _mm512_maskz_permutexvar_epi8(0x8080_8080_8080_8080, ninth, data);
            return _mm512_srlv_epi64(_mm512_shldv_epi64(head, ninth, self.before), self.after);
        }
        _mm512_and_si512(_mm512_srlv_epi64(head, self.after), self.mask)
    }
}

/// Unpacks sixteen values from 2 · `width` bytes where no value touches more than four: one
/// permutation for two groups of eight.
struct PairUnpacker {
    /// Per value of the first group, the indices of its four bytes, and those of the same value of
    /// the second group.
    bytes: __m512i,
    after_first: __m512i,
    after_second: __m512i,
    mask: __m512i,
}

impl PairUnpacker {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn new(width: u32) -> Self {
        let (first, before) = places(width);
        let spare = _mm512_set1_epi64(32 - i64::from(width));
        let after_first = _mm512_sub_epi64(spare, before);
        let next = _mm512_set1_epi64(
            (0x0101_0101_0000_0000 * u64::from(width) + 0x0001_0203_0001_0203) as i64,
        );
        Self {
            bytes: _mm512_add_epi8(first, next),
            after_first,
            after_second: _mm512_add_epi64(after_first, _mm512_set1_epi64(32)),
            mask: _mm512_set1_epi64(max_value(width) as i64),
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    fn values(&self, data: __m512i) -> (__m512i, __m512i) {
        let heads = _mm512_permutexvar_epi8(self.bytes, data);
        let first = _mm512_and_si512(_mm512_srlv_epi64(heads, self.after_first), self.mask);
        (first, _mm512_and_si512(_mm512_srlv_epi64(heads, self.after_second), self.mask))
    }
}

/// For eight values, the index of the byte with the first bit, in all eight bytes, and the bits
/// before it in that byte.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn places(width: u32) -> (__m512i, __m512i) {
    const SECOND: i64 = 0x0808_0808_0808_0808; // the lowest byte of the second value in a quarter
    let bit = _mm512_mul_epu32(
        _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7),
        _mm512_set1_epi64(i64::from(width)),
    );
    let spread = _mm512_setr_epi64(0, SECOND, 0, SECOND, 0, SECOND, 0, SECOND);
    (
        _mm512_shuffle_epi8(_mm512_srli_epi64::<3>(bit), spread),
        _mm512_and_si512(bit, _mm512_set1_epi64(7)),
    )
}

/// Unpacks sixteen values of at most 32 bits from 2 · `width` bytes, and leaves them in 32 bits
/// each; `FIVE` if a value may touch five bytes.
#[derive(Clone, Copy)]
struct NarrowUnpacker<const FIVE: bool> {
    /// Per value, the indices of the four bytes up to the one with its last bit, that one first.
    bytes: __m512i,
    /// Per value, the bits after its last one in that byte.
    after: __m512i,
    mask: __m512i,
}

impl<const FIVE: bool> NarrowUnpacker<FIVE> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn new(width: u32) -> Self {
        let number = _mm512_setr_epi32(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16);
        let end = _mm512_sub_epi32(
            _mm512_mullo_epi32(number, _mm512_set1_epi32(width as i32)),
            _mm512_set1_epi32(1),
        );
        let spread = _mm512_set4_epi32(0x0C0C_0C0C, 0x0808_0808, 0x0404_0404, 0);
        let last = _mm512_shuffle_epi8(_mm512_srli_epi32::<3>(end), spread);
        Self {
            bytes: _mm512_sub_epi8(last, _mm512_set1_epi32(0x0302_0100)),
            after: _mm512_andnot_si512(end, _mm512_set1_epi32(7)),
            mask: _mm512_set1_epi32(max_value(width) as i32),
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vbmi2")]
    fn values(&self, data: __m512i) -> __m512i {
        // Indices count modulo 64, so bytes before the first are some others; they have no bit of a
        // value.
        let lower = _mm512_permutexvar_epi8(self.bytes, data);
        if FIVE {
            let upper =
                _mm512_permutexvar_epi8(_mm512_sub_epi8(self.bytes, _mm512_set1_epi8(4)), data);
            return _mm512_and_si512(_mm512_shrdv_epi32(lower, upper, self.after), self.mask);
        }
        _mm512_and_si512(_mm512_srlv_epi32(lower, self.after), self.mask)
    }
}

/// See [`super::unpack_values`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
pub(super) fn unpack<V: Value>(data: &[u8], width: u32, out: &mut [V]) -> u64 {
    match V::typed(out) {
        ValuesMut::U32(out) if width <= 16 => unpack_narrow::<false, true>(data, width, out),
        ValuesMut::U32(out) if five_bytes(width) => unpack_narrow::<true, false>(data, width, out),
        ValuesMut::U32(out) => unpack_narrow::<false, false>(data, width, out),
        ValuesMut::U64(out) if nine_bytes(width as usize) => unpack_words::<true>(data, width, out),
        ValuesMut::U64(out) => unpack_words::<false>(data, width, out),
    }
}

/// `SHARED`: thirty-two values lie in 64 bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
fn unpack_narrow<const FIVE: bool, const SHARED: bool>(
    data: &[u8],
    width: u32,
    out: &mut [u32],
) -> u64 {
    let unpacker = NarrowUnpacker::<FIVE>::new(width);
    let bytes = 2 * width as usize;
    let next = NarrowUnpacker {
        bytes: _mm512_add_epi8(unpacker.bytes, _mm512_set1_epi8(bytes as i8)),
        ..unpacker
    };
    let mut data = data;
    let mut out = out;
    let mut largest = _mm512_setzero_si512();
    // Two at a time: counting takes as long as unpacking one.
    while out.len() >= 32 && data.len() >= bytes + 64 {
        let here = &data[..bytes + 64];
        let (two, rest) = out.split_at_mut(32);
        let loaded = load_bytes(here);
        let first = unpacker.values(loaded);
        let second =
            if SHARED { next.values(loaded) } else { unpacker.values(load_bytes(&here[bytes..])) };
        largest = _mm512_max_epu32(largest, _mm512_max_epu32(first, second));
        store_values(two, first);
        store_values(&mut two[16..], second);
        data = &data[2 * bytes..];
        out = rest;
    }
    while out.len() >= 16 {
        let values = unpacker.values(load_bytes(data));
        largest = _mm512_max_epu32(largest, values);
        store_values(out, values);
        data = &data[bytes..];
        out = &mut out[16..];
    }
    if !out.is_empty() {
        let values = unpacker.values(load_bytes(data));
        let values = _mm512_maskz_mov_epi32(low_bits(out.len()) as u16, values);
        largest = _mm512_max_epu32(largest, values);
        store_values(out, values);
    }
    u64::from(_mm512_reduce_max_epu32(largest))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
fn unpack_words<const WIDE: bool>(data: &[u8], width: u32, out: &mut [u64]) -> u64 {
    let unpacker = Unpacker::<WIDE>::new(width);
    let bytes = width as usize;
    let mut data = data;
    let mut out = out;
    let mut largest = _mm512_setzero_si512();
    if width <= 32 && !five_bytes(width) {
        let pairs = PairUnpacker::new(width);
        while out.len() >= 16 {
            let (a, b) = pairs.values(load_bytes(data));
            largest = _mm512_max_epu64(largest, _mm512_max_epu64(a, b));
            store_values(out, a);
            store_values(&mut out[8..], b);
            data = &data[2 * bytes..];
            out = &mut out[16..];
        }
    } else {
        let second = Unpacker {
            bytes: _mm512_add_epi8(unpacker.bytes, _mm512_set1_epi8(width as i8)),
            ..unpacker
        };
        while out.len() >= 16 {
            let loaded = load_bytes(data);
            let a = unpacker.values(loaded);
            let b = if width <= 32 {
                second.values(loaded)
            } else {
                unpacker.values(load_bytes(&data[bytes..]))
            };
            largest = _mm512_max_epu64(largest, _mm512_max_epu64(a, b));
            store_values(out, a);
            store_values(&mut out[8..], b);
            data = &data[2 * bytes..];
            out = &mut out[16..];
        }
    }
    while out.len() >= 8 {
        let values = unpacker.values(load_bytes(data));
        largest = _mm512_max_epu64(largest, values);
        store_values(out, values);
        data = &data[bytes..];
        out = &mut out[8..];
    }
    if !out.is_empty() {
        let values = unpacker.values(load_bytes(data));
        let values = _mm512_maskz_mov_epi64(low_bits(out.len()) as u8, values);
        largest = _mm512_max_epu64(largest, values);
        store_values(out, values);
    }
    _mm512_reduce_max_epu64(largest)
}

/// How the values of one register come to lie in the packed bytes.
///
/// `fields` of `bits` bits, each in its own slot, are rotated left until every bit has its final
/// place within a byte. A packed byte then takes its upper bits from the slot whose field ends in
/// it, and the others from the one whose field begins.
struct Plan {
    /// Per slot, the rotation, as a count or, where nothing falls out at the top, as a factor.
    rotate: [[u8; 8]; 8],
    /// Per packed byte, the byte of the register with its upper bits.
    upper: [u8; 64],
    /// Per packed byte, the byte of the register with the bits where `begins` has ones.
    lower: [u8; 64],
    begins: [u8; 64],
}

/// Bytes of the slot that a value of `width` bits is narrowed to.
const fn slot_of(width: usize) -> usize {
    match width {
        1..=6 => 1,
        7..=16 => 2,
        17..=32 => 4,
        _ => 8,
    }
}

/// Values that are joined to one field of a larger slot: without it, more than two narrow values
/// would meet in a byte.
const fn joined(width: usize) -> usize {
    match width {
        1 | 2 => 4,
        3..=6 => 2,
        _ => 1,
    }
}

/// Whether a field of `bits` bits may touch one more byte than its slot has.
const fn wraps(bits: usize, slot: usize) -> bool {
    let mut field = 0;
    while field < 8 {
        if field * bits % 8 + bits > 8 * slot {
            return true;
        }
        field += 1;
    }
    false
}

/// Whether the rotation is a multiplication, which other units than those of shifts and
/// permutations do.
const fn multiplies(bits: usize, slot: usize) -> bool {
    slot < 8 && !wraps(bits, slot)
}

/// The slot of the register that [`load_narrowed`] puts value `i` of `value_bytes` bytes in.
const fn place(i: usize, slot: usize, value_bytes: usize) -> usize {
    if value_bytes == 4 {
        let load = i / 16;
        let quarter = i / 4 % 4;
        let lane = i % 4;
        return match slot {
            4 => i,
            2 => 8 * quarter + 4 * load + lane,
            _ => 16 * quarter + 4 * load + lane,
        };
    }
    let load = i / 8;
    let lane = i % 8;
    match slot {
        8 => i,
        4 => 2 * lane + load,
        2 => 4 * lane + 2 * (load % 2) + load / 2,
        _ => 8 * lane + 4 * (load % 2) + 2 * (load / 2 % 2) + load / 4,
    }
}

impl Plan {
    const fn new(width: usize, value_bytes: usize) -> Self {
        let join = joined(width);
        let slot = slot_of(width) * join;
        let bits = width * join;
        let mut plan =
            Self { rotate: [[0; 8]; 8], upper: [0; 64], lower: [0; 64], begins: [0; 64] };
        let mut field = 0;
        while field < 64 / slot {
            // Joined fields have been brought into order.
            let at = slot * if join > 1 { field } else { place(field, slot, value_bytes) };
            let byte = field * bits / 8;
            let before = field * bits % 8;
            let rotate = (16 * slot - bits - before) % (8 * slot);
            if multiplies(bits, slot) {
                plan.rotate[(at + rotate / 8) / 8][(at + rotate / 8) % 8] = 1 << (rotate % 8);
            } else {
                plan.rotate[at / 8][at % 8] = rotate as u8;
            }
            // The byte that it begins in, after a field that may have begun there, too, and the
            // bytes that follow.
            if plan.begins[byte] != 0 {
                plan.upper[byte] = plan.lower[byte];
            }
            plan.lower[byte] = (at + slot - 1) as u8;
            plan.begins[byte] = 0xFF >> before;
            let mut i = 1;
            while i < (before + bits).div_ceil(8) {
                plan.upper[byte + i] = (at + (2 * slot - 1 - i) % slot) as u8;
                i += 1;
            }
            field += 1;
        }
        plan
    }
}

/// The plans of one type, by width.
struct Plans<V>(PhantomData<V>);

impl<V: Value> Plans<V> {
    const ALL: &'static [Plan; 64] = &{
        let mut plans = [const { Plan::new(1, size_of::<V>()) }; 64];
        let mut width = 1;
        while width <= V::BITS as usize {
            plans[width - 1] = Plan::new(width, size_of::<V>());
            width += 1;
        }
        plans
    };

    /// The values' order in the register of [`load_narrowed`] with one byte each.
    const ORDER: &'static [u8; 64] = &{
        let mut order = [0; 64];
        let mut i = 0;
        while i < 64 {
            order[i] = place(i, 1, size_of::<V>()) as u8;
            i += 1;
        }
        order
    };
}

/// Loads 64 / `SLOT` values, fewer at the end, and narrows each to `SLOT` bytes, in the order of
/// [`place`]. ORs the values into `any`.
///
/// `TWENTY` says that they have at most 20 bits: then a multiplication of 52 bits brings two
/// together, on units that are idle otherwise.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512ifma")]
fn load_narrowed<V: Value, const SLOT: usize, const TWENTY: bool>(
    values: &[V],
    any: &mut __m512i,
) -> __m512i {
    if SLOT >= size_of::<V>() {
        let loaded = load_values(values);
        *any = _mm512_or_si512(*any, loaded);
        return loaded;
    }
    let (low, high) = values.split_at(values.len().min(32 / SLOT));
    // Twice as large each.
    let (low, high) = match SLOT {
        4 => (load_narrowed::<V, 8, TWENTY>(low, any), load_narrowed::<V, 8, TWENTY>(high, any)),
        2 => (load_narrowed::<V, 4, TWENTY>(low, any), load_narrowed::<V, 4, TWENTY>(high, any)),
        _ => (load_narrowed::<V, 2, TWENTY>(low, any), load_narrowed::<V, 2, TWENTY>(high, any)),
    };
    match (SLOT, size_of::<V>()) {
        (4, _) if TWENTY => _mm512_madd52lo_epu64(low, high, _mm512_set1_epi64(1 << 32)),
        (4, _) => _mm512_mask_shuffle_epi32::<0b10_10_00_00>(low, 0xAAAA, high),
        // Without saturation, as the values fit.
        (2, 4) => _mm512_packus_epi32(low, high),
        (_, 4) => _mm512_packus_epi16(low, high),
        (2, _) => {
            let up = _mm512_set4_epi32(0x0D0C_0000, 0x0908_0000, 0x0504_0000, 0x0100_0000);
            _mm512_mask_shuffle_epi8(low, 0xCCCC_CCCC_CCCC_CCCC, high, up)
        }
        _ => {
            let up = _mm512_set4_epi32(0x0E00_0C00, 0x0A00_0800, 0x0600_0400, 0x0200_0000);
            _mm512_mask_shuffle_epi8(low, 0xAAAA_AAAA_AAAA_AAAA, high, up)
        }
    }
}

/// See [`super::pack_values`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512ifma,avx512vl,avx512vbmi,avx512vbmi2")]
pub(super) fn pack<V: Value>(values: &[V], width: u32, out: &mut [u8]) -> u64 {
    match width {
        1 | 2 => pack_as::<V, 1, 4, true, true>(values, width, out),
        3..=6 => pack_as::<V, 1, 2, true, true>(values, width, out),
        7..=10 | 12 | 16 => pack_as::<V, 2, 1, true, true>(values, width, out),
        11..=15 => pack_as::<V, 2, 1, true, false>(values, width, out),
        17..=20 => pack_as::<V, 4, 1, true, true>(values, width, out),
        21..=26 | 28 | 32 => pack_as::<V, 4, 1, false, true>(values, width, out),
        27..=31 => pack_as::<V, 4, 1, false, false>(values, width, out),
        _ => pack_as::<V, 8, 1, false, false>(values, width, out),
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512ifma,avx512vl,avx512vbmi,avx512vbmi2")]
fn pack_as<
    V: Value,
    const SLOT: usize,
    const JOINED: usize,
    const TWENTY: bool,
    const MULTIPLY: bool,
>(
    values: &[V],
    width: u32,
    out: &mut [u8],
) -> u64 {
    debug_assert!(
        (slot_of(width as usize), joined(width as usize)) == (SLOT, JOINED),
        "width {width}"
    );
    debug_assert!(multiplies(width as usize * JOINED, SLOT * JOINED) == MULTIPLY, "width {width}");
    let packer = Packer::<SLOT, JOINED, MULTIPLY>::new::<V>(width);
    let mut values = values;
    let mut out = out;
    let mut any = _mm512_setzero_si512();
    let bytes = 8 * width as usize / SLOT;
    // Two at a time where that is quicker, and whole stores: what is after the packed bytes is
    // written again.
    while size_of::<V>() == 4 && values.len() >= 128 / SLOT && out.len() >= bytes + 64 {
        let (first, rest) = values.split_at(64 / SLOT);
        let here = &mut out[..bytes + 64];
        let (second, rest) = rest.split_at(64 / SLOT);
        let first = packer.packed(load_narrowed::<V, SLOT, TWENTY>(first, &mut any));
        let second = packer.packed(load_narrowed::<V, SLOT, TWENTY>(second, &mut any));
        store_bytes(here, first);
        store_bytes(&mut here[bytes..], second);
        values = rest;
        out = &mut out[2 * bytes..];
    }
    while let Some((now, rest)) = values.split_at_checked(64 / SLOT) {
        let (here, later) = out.split_at_mut(bytes);
        store_bytes(here, packer.packed(load_narrowed::<V, SLOT, TWENTY>(now, &mut any)));
        values = rest;
        out = later;
    }
    if !values.is_empty() {
        store_bytes(out, packer.packed(load_narrowed::<V, SLOT, TWENTY>(values, &mut any)));
    }
    if size_of::<V>() == 4 {
        u64::from(_mm512_reduce_or_epi32(any) as u32)
    } else {
        _mm512_reduce_or_epi64(any) as u64
    }
}

/// The constants of a [`Plan`], in registers.
struct Packer<const SLOT: usize, const JOINED: usize, const MULTIPLY: bool> {
    order: __m512i,
    join_2: __m512i,
    join_4: __m512i,
    rotate: __m512i,
    upper: __m512i,
    lower: __m512i,
    begins: __m512i,
}

impl<const SLOT: usize, const JOINED: usize, const MULTIPLY: bool> Packer<SLOT, JOINED, MULTIPLY> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn new<V: Value>(width: u32) -> Self {
        let plan = &Plans::<V>::ALL[width as usize - 1];
        // With two values of w bits joined, the first counts 2^w times as much as the second.
        let join =
            |lanes: u32| if JOINED > 1 { 1 << (4 * lanes) | 1 << (width * lanes / 2) } else { 0 };
        Self {
            order: load_bytes(Plans::<V>::ORDER),
            join_2: _mm512_set1_epi16(join(2) as i16),
            join_4: _mm512_set1_epi32(join(4)),
            rotate: load_bytes(plan.rotate.as_flattened()),
            upper: load_bytes(&plan.upper),
            lower: load_bytes(&plan.lower),
            begins: load_bytes(&plan.begins),
        }
    }

    /// Narrowed values, packed.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vbmi2")]
    fn packed(&self, narrowed: __m512i) -> __m512i {
        let mut fields = narrowed;
        if JOINED > 1 {
            fields = _mm512_maddubs_epi16(self.join_2, _mm512_permutexvar_epi8(self.order, fields));
        }
        if JOINED > 2 {
            fields = _mm512_madd_epi16(self.join_4, fields);
        }
        let rotated = match (SLOT * JOINED, MULTIPLY) {
            (2, true) => _mm512_mullo_epi16(fields, self.rotate),
            (2, false) => _mm512_shldv_epi16(fields, fields, self.rotate),
            (4, true) => _mm512_mullo_epi32(fields, self.rotate),
            (4, false) => _mm512_rolv_epi32(fields, self.rotate),
            _ => _mm512_rolv_epi64(fields, self.rotate),
        };
        let upper = _mm512_permutexvar_epi8(self.upper, rotated);
        let lower = _mm512_permutexvar_epi8(self.lower, rotated);
        // Bits of `lower` where `begins` has ones, of `upper` elsewhere.
        _mm512_ternarylogic_epi64::<0xD8>(upper, lower, self.begins)
    }
}
