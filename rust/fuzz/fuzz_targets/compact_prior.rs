//! Crafted priors, nearly valid: refused, or rows come back, and any bytes are safe to decode.
#![no_main]

use arbitrary::{Result, Unstructured};
use distillkit_codec::CodecError;
use distillkit_codec::compact::{
    Cluster, Compact, CompactConfig, Contexts, Dimensions, Prior, SLOTS, Scale, Table,
};
use distillkit_fuzz::{check_compact_bytes, check_compact_rows, compact_rows};
use libfuzzer_sys::{Corpus, fuzz_target};

fn table(u: &mut Unstructured) -> Result<Table> {
    let mut slots = [0u16; 64];
    let mut left = SLOTS as u16;
    for _ in 0..u.int_in_range(0..=8u8)? {
        let symbol = u.int_in_range(0..=62usize)?;
        let most = if u.ratio(1, 8)? { 1200 } else { left.saturating_sub(1) };
        slots[symbol] = u.int_in_range(0..=most)?;
        left = left.saturating_sub(slots[symbol]);
    }
    slots[63] = left;
    Ok(Table(slots))
}

fn prior(u: &mut Unstructured) -> Result<Prior> {
    let vocab_size = u.int_in_range(2..=300u32)?;
    let config = CompactConfig {
        vocab_size,
        k: u.int_in_range(1..=vocab_size.min(40) as usize)?,
        threshold: if u.arbitrary()? { Some(0.02) } else { None },
        mass: if u.arbitrary()? { Some(0.9) } else { None },
        step: *u.choose(&[0.003, 0.02, 0.25])?,
        prior: None,
    };
    let classes = [u.int_in_range(1..=3usize)?, u.int_in_range(1..=3)?, u.int_in_range(1..=4)?];
    let sizes = Dimensions::new(&config, classes[0], classes[1], classes[2]);
    let gaps = u.int_in_range(1..=4u16)?;
    let others = u.int_in_range(1..=6u16)?;
    let mut map = |count: usize, from: u16, to: u16| -> Result<Vec<u16>> {
        let pattern = (0..7).map(|_| u.int_in_range(from..=to)).collect::<Result<Vec<_>>>()?;
        Ok(pattern.into_iter().cycle().take(count).collect())
    };
    let contexts = Contexts {
        cluster: gaps,
        shape: map(sizes.shape_classes, gaps, gaps + others - 1)?,
        count: map(sizes.shapes, gaps, gaps + others - 1)?,
        mass: map(sizes.shapes, gaps, gaps + others - 1)?,
        gap: map(sizes.gap_classes * sizes.positions * sizes.left, 0, gaps - 1)?,
        level: map(sizes.shapes * 2 * sizes.positions, gaps, gaps + others - 1)?,
    };
    let tables = (0..gaps + others).map(|_| table(u)).collect::<Result<_>>()?;
    let clusters = (0..u.int_in_range(1..=4u8)?)
        .map(|_| {
            // Ascending ids are in order in every bucket.
            let first = u.int_in_range(0..=vocab_size - 1)?;
            let last = u.int_in_range(first..=vocab_size - 1)?;
            let every = u.int_in_range(1..=5usize)?;
            Ok(Cluster {
                list: (first..=last).step_by(every).collect(),
                gap_class: u.int_in_range(0..=sizes.gap_classes as u8)? % 4,
                shape_class: u.int_in_range(0..=sizes.shape_classes as u8 - 1)?,
            })
        })
        .collect::<Result<_>>()?;
    let levels = Scale::new(config.step).nominals();
    Ok(Prior { order: (0..vocab_size).collect(), clusters, levels, contexts, tables, config })
}

fuzz_target!(|input: &[u8]| -> Corpus {
    let mut u = Unstructured::new(input);
    let Ok(prior) = prior(&mut u) else {
        return Corpus::Reject;
    };
    if let Err(error) = prior.validate() {
        assert!(matches!(error, CodecError::Corrupt(_)), "{error:?}");
        // The bytes leave out the escapes' frequencies, so they may be a valid prior.
        let read = Prior::from_bytes(&prior.to_bytes());
        assert!(read.is_err() || read.is_ok_and(|read| read.validate().is_ok()));
        return Corpus::Keep;
    }
    let data = prior.to_bytes();
    assert_eq!(Prior::from_bytes(&data).as_ref(), Ok(&prior));
    let codec = Compact::new(prior.config, Some(&data)).expect("valid");
    if let Ok((ids, logprobs, width)) = compact_rows(&mut u, codec.config()) {
        let document = codec.encode_document(&ids, &logprobs, width).expect("encodes");
        assert!(check_compact_rows(&codec, &document, ids.len() / width));
    }
    let rest = u.take_rest();
    check_compact_bytes(&codec, rest, rest.get(1).map_or(0, |&rows| usize::from(rows)));
    Corpus::Keep
});
