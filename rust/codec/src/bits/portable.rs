//! Packing a word at a time. The loops are made for every width, so that all shifts are constants.

use std::marker::PhantomData;

use super::{Value, nine_bytes, pack_with};

macro_rules! every_width {
    ($function:ident) => {
        &every_width!($function:
            1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32
            33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61
            62 63 64)
    };
    ($function:ident: $($width:literal)+) => { [$($function::<V, $width>),+] };
}

type Unpack<V> = fn(&[u8], &mut [V]) -> u64;
type Pack<V> = fn(&[V], &mut [u8]) -> u64;

/// The loops of one type, by width.
struct Loops<V>(PhantomData<V>);

impl<V: Value> Loops<V> {
    const UNPACK: &'static [Unpack<V>; 64] = every_width!(unpack_as);
    const PACK: &'static [Pack<V>; 64] = every_width!(pack_as);
}

/// See [`super::unpack_values`].
pub(super) fn unpack<V: Value>(data: &[u8], width: u32, out: &mut [V]) -> u64 {
    Loops::UNPACK[width as usize - 1](data, out)
}

/// See [`super::pack_values`].
pub(super) fn pack<V: Value>(values: &[V], width: u32, out: &mut [u8]) -> u64 {
    Loops::PACK[width as usize - 1](values, out)
}

/// Eight bytes, the first one the most significant.
#[inline(always)]
fn word(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_be_bytes(word)
}

/// Stops the loops of widths that the type does not have, and reduces them to this check.
#[inline(always)]
fn assert_holds<V: Value>(width: usize) {
    assert!(width <= V::BITS as usize, "the width is checked before");
}

fn unpack_as<V: Value, const WIDTH: usize>(data: &[u8], out: &mut [V]) -> u64 {
    assert_holds::<V>(WIDTH);
    let nine = nine_bytes(WIDTH);
    // The bytes that the loads of eight values touch.
    let touched = 7 * WIDTH / 8 + 8 + usize::from(nine);
    let mut largest = V::default();
    let mut group_data = data;
    let mut done = 0;
    for group in out.chunks_exact_mut(8) {
        let Some(bytes) = group_data.get(..touched) else { break };
        for (i, value) in group.iter_mut().enumerate() {
            let byte = i * WIDTH / 8;
            let before = i * WIDTH % 8;
            let mut head = word(bytes, byte) << before;
            if nine {
                head |= u64::from(bytes[byte + 8]) >> (8 - before);
            }
            *value = V::low(head >> (64 - WIDTH));
            largest = largest.max(*value);
        }
        group_data = &group_data[WIDTH..];
        done += 8;
    }
    unpack_last(data, WIDTH, done, out).max(largest.into())
}

/// Unpacks the values from `done` on, without a load across the end of `data`. Returns the largest
/// of them.
pub(super) fn unpack_last<V: Value>(data: &[u8], width: usize, done: usize, out: &mut [V]) -> u64 {
    let padded = &mut [0; 8];
    let data = if data.len() < 8 {
        padded[..data.len()].copy_from_slice(data);
        &padded[..]
    } else {
        data
    };
    let mut largest = V::default();
    for (i, value) in out.iter_mut().enumerate().skip(done) {
        // Near the end the last word has all bits; it is only further from the start of the value.
        let at = (i * width / 8).min(data.len() - 8);
        let before = i * width - at * 8;
        let mut head = word(data, at) << before;
        if before < 8
            && let Some(&ninth) = data.get(at + 8)
        {
            head |= u64::from(ninth) >> (8 - before);
        }
        *value = V::low(head >> (64 - width));
        largest = largest.max(*value);
    }
    largest.into()
}

fn pack_as<V: Value, const WIDTH: usize>(values: &[V], out: &mut [u8]) -> u64 {
    assert_holds::<V>(WIDTH);
    let (groups, rest) = values.as_chunks::<8>();
    let (packed, packed_rest) = out.split_at_mut(groups.len() * WIDTH);
    let mut any = 0;
    for (group, packed) in groups.iter().zip(packed.chunks_exact_mut(WIDTH)) {
        // The upper `bits` bits of `pending` are not written yet.
        let mut pending = 0;
        let mut bits = 0;
        let mut at = 0;
        for &value in group {
            let value: u64 = value.into();
            any |= value;
            bits += WIDTH;
            if bits < 64 {
                pending |= value << (64 - bits);
                continue;
            }
            bits -= 64;
            packed[at..at + 8].copy_from_slice(&(pending | value >> bits).to_be_bytes());
            pending = if bits == 0 { 0 } else { value << (64 - bits) };
            at += 8;
        }
        packed[at..].copy_from_slice(&pending.to_be_bytes()[..WIDTH % 8]);
    }
    pack_with(rest.len(), WIDTH as u32, packed_rest, |i| rest[i].into());
    rest.iter().fold(any, |any, &value| any | value.into())
}
