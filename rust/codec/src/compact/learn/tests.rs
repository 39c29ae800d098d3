use super::*;
use crate::compact::{Compact, Prior};

/// Rows of a teacher that has topics: each is about one, with ids of its own and common ones.
fn sample(rows: usize, k: usize, vocab: u32, seed: u64) -> (Vec<i64>, Vec<f32>) {
    let mut state = seed;
    let mut random = move |below: u64| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let (mut ids, mut logprobs) = (Vec::new(), Vec::new());
    for _ in 0..rows {
        let topic = random(6);
        let mut row: Vec<i64> = Vec::new();
        while row.len() < k {
            // Falls off towards the end of the topic's ids.
            let own = random(3) > 0;
            let within = 1 + random(2 * k as u64);
            let place = random(within);
            let id = if own { place * 7 + topic * 131 } else { place } % u64::from(vocab);
            if !row.contains(&(id as i64)) {
                row.push(id as i64);
            }
        }
        let steepness = 0.5 + random(100) as f64 / 100.0;
        let weights: Vec<f64> = (1..=k).map(|rank| (rank as f64).powf(-1.0 - steepness)).collect();
        let total = weights.iter().sum::<f64>() * (1.02 + random(100) as f64 / 1000.0);
        ids.extend(row);
        logprobs.extend(weights.iter().map(|weight| (weight / total).ln() as f32));
    }
    (ids, logprobs)
}

fn config(vocab: u32, k: usize, more: &str) -> CompactConfig {
    let json = format!("{{\"vocab_size\": {vocab}, \"k\": {k}, \"step\": 0.01{more}}}");
    CompactConfig::from_json(&json).expect("valid")
}

fn codec(config: &CompactConfig, prior: Option<&Prior>) -> Compact {
    Compact::new(config.clone(), prior.map(Prior::to_bytes).as_deref()).expect("fits")
}

/// Bytes of rows, after checking that they come back.
fn encoded_bytes(codec: &Compact, (ids, logprobs): &(Vec<i64>, Vec<f32>), width: usize) -> usize {
    let k = codec.config().k;
    let rows = ids.len() / width;
    let data = codec.encode_document(ids, logprobs, width).expect("rows are valid");
    let (mut read, mut values) = (vec![0; rows * k], vec![0.0; rows * k]);
    codec.decode_document(&data, &mut read, &mut values).expect("as written");
    for row in 0..rows {
        let stored =
            values[row * k..(row + 1) * k].iter().filter(|value| value.is_finite()).count();
        let mut found = read[row * k..row * k + stored].to_vec();
        let mut wanted = ids[row * width..row * width + stored].to_vec();
        assert_eq!(found[0], wanted[0], "the most probable id");
        found.sort_unstable();
        wanted.sort_unstable();
        assert_eq!(found, wanted);
    }
    data.len()
}

#[test]
fn threads_do_not_matter() {
    let (ids, logprobs) = sample(1500, 20, 3000, 1);
    let config = config(3000, 20, "");
    let [one, three] = [1, 3].map(|threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
        pool.install(|| learn(&config, &ids, &logprobs, 20, None)).expect("learned").to_bytes()
    });
    assert!(one == three);
}

#[test]
fn other_rows_of_the_teacher_take_fewer_bytes() {
    for more in ["", ", \"threshold\": 0.01"] {
        let config = config(3000, 20, more);
        let (ids, logprobs) = sample(4000, 20, 3000, 1);
        let prior = learn(&config, &ids, &logprobs, 20, None).expect("learned");
        assert!(prior.clusters.len() > 6 && prior.contexts.count.len() > 6);
        let others = sample(400, 20, 3000, 2);
        let learned = encoded_bytes(&codec(&config, Some(&prior)), &others, 20);
        let builtin = encoded_bytes(&codec(&config, None), &others, 20);
        assert!(10 * learned < 8 * builtin, "{learned} bytes, {builtin} with the built-in prior");
    }
}

#[test]
fn any_rows_will_do() {
    for (rows, k, vocab) in [
        (1, 1, 2),
        (1, 2, 2),
        (1, 20, 300),
        (15, 20, 20),
        (16, 5, 300),
        (100, 5, 300),
        (300, 1, 70_000),
    ] {
        for more in ["", ", \"mass\": 0.5"] {
            let config = config(vocab, k, more);
            // All rows the same, and each different.
            let one = sample(1, k, vocab, 3);
            let same = (one.0.repeat(rows), one.1.repeat(rows));
            for rows in [same, sample(rows, k, vocab, 4)] {
                let prior = learn(&config, &rows.0, &rows.1, k, None).expect("learned");
                let bytes = prior.to_bytes();
                assert!(Prior::from_bytes(&bytes).expect("valid") == prior);
                let codec = codec(&config, Some(&prior));
                encoded_bytes(&codec, &rows, k);
                encoded_bytes(&codec, &sample(3, k, vocab, 5), k);
            }
        }
    }
    // Rows may have fewer ids than k, and more than k are given.
    let config = config(300, 3, "");
    let (ids, logprobs) = (
        [5, 6, 7, 8, 9, 10, 11, 12],
        [-0.1, f32::NEG_INFINITY, f32::NEG_INFINITY, f32::NEG_INFINITY, -1.0, -1.5, -1.7, -3.0],
    );
    let prior = learn(&config, &ids, &logprobs, 4, None).expect("learned");
    assert!([5, 9, 10, 11].iter().all(|id| prior.order[..8].contains(id)));
}

#[test]
fn clusters_are_taken_over() {
    let rows = sample(3000, 20, 3000, 1);
    let base = learn(&config(3000, 20, ""), &rows.0, &rows.1, 20, None).expect("learned");
    let other = config(3000, 12, ", \"threshold\": 0.002");
    let fresh = learn(&other, &rows.0, &rows.1, 20, None).expect("learned");
    let taken = learn(&other, &rows.0, &rows.1, 20, Some(&base.to_bytes())).expect("learned");
    let lists = |prior: &Prior| -> Vec<Vec<u32>> {
        prior.clusters.iter().map(|cluster| cluster.list.clone()).collect()
    };
    assert!(lists(&taken) == lists(&base) && taken.order == base.order);
    assert_eq!(taken.config, other);
    let others = sample(400, 20, 3000, 2);
    let own = (others.0.clone(), others.1.clone());
    let [fresh, taken] = [&fresh, &taken].map(|prior| {
        codec(&other, Some(prior)).encode_document(&own.0, &own.1, 20).expect("valid").len()
    });
    assert!(
        20 * taken < 21 * fresh,
        "{taken} bytes with clusters of another prior, {fresh} with own"
    );
    // The numbers of clusters don't matter.
    let mut turned = base.clone();
    turned.clusters.reverse();
    let [one, two] = [&base, &turned].map(|base| {
        let prior = learn(&base.config, &rows.0, &rows.1, 20, Some(&base.to_bytes()));
        encoded_bytes(&codec(&base.config, Some(&prior.expect("learned"))), &others, 20)
    });
    assert!(one.abs_diff(two) * 40 < one, "{one} bytes, {two} with clusters in another order");
}

#[test]
fn what_cannot_be_learned_from_is_refused() {
    let config = config(300, 5, "");
    let (ids, logprobs) = sample(200, 5, 300, 1);
    let refused = |ids: &[i64], logprobs: &[f32], width, base: Option<&[u8]>| {
        learn(&config, ids, logprobs, width, base).expect_err("refused").to_string()
    };
    let contains = |message: String, parts: &[&str]| {
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    };
    contains(refused(&[], &[], 5, None), &["rows"]);
    contains(refused(&ids[..4], &logprobs[..4], 4, None), &["4", "5"]);
    let mut beyond = ids.clone();
    beyond[5 * 150 + 2] = 300;
    contains(refused(&beyond, &logprobs, 5, None), &["row 150", "300"]);
    let base = learn(&config, &ids, &logprobs, 5, None).expect("learned");
    contains(refused(&beyond, &logprobs, 5, Some(&base.to_bytes())), &["row 150", "300"]);
    let other = learn(&self::config(301, 5, ""), &ids, &logprobs, 5, None).expect("learned");
    contains(refused(&ids, &logprobs, 5, Some(&other.to_bytes())), &["301", "300"]);
    let bytes = base.to_bytes();
    for end in (0..bytes.len()).step_by(97) {
        assert!(learn(&config, &ids, &logprobs, 5, Some(&bytes[..end])).is_err());
    }
    // Whatever is still a prior can be a base.
    for place in (0..bytes.len()).step_by(61) {
        let mut damaged = bytes.clone();
        damaged[place] ^= 1 << (place % 8);
        if let Ok(prior) = learn(&config, &ids, &logprobs, 5, Some(&damaged)) {
            encoded_bytes(&codec(&config, Some(&prior)), &(ids.clone(), logprobs.clone()), 5);
        }
    }
}
