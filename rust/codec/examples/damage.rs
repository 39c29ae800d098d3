//! Damages documents and priors of the compact format, and checks that each is refused with an error
//! that says so, or decodes to rows that are ones. Damage that leaves the checksum as it was must be
//! refused or make no difference.
//!
//! `cargo run --release -p distillkit-codec --example damage -- --inputs 40000000 [--seed 1]`

#![expect(clippy::print_stdout, reason = "progress is what it shows")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

use distillkit_codec::CodecError;
use distillkit_codec::compact::{Compact, CompactConfig, checksum, learn};

const VOCAB: usize = 300;
const K: usize = 8;
/// One input in so many is a prior: to prepare one takes as long as to decode hundreds of documents.
const PRIORS: u64 = 128;
/// Numbers of rows of the documents: with one lane, with four, and with sixteen.
const ROWS: [usize; 4] = [1, 9, 33, 130];

/// Numbers without a pattern (xorshift64*).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    /// Rows of K ids and log-probabilities, low ids more often.
    fn rows(&mut self, count: usize) -> (Vec<i64>, Vec<f32>) {
        let (mut ids, mut logprobs) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let mut row: Vec<i64> = Vec::new();
            while row.len() < K {
                let most = 1 + self.below(VOCAB);
                let id = self.below(most) as i64;
                if !row.contains(&id) {
                    row.push(id);
                }
            }
            let slope = 0.2 + self.below(100) as f32 / 30.0;
            ids.extend(row);
            logprobs.extend((0..K).map(|rank| -2.1 - slope * rank as f32));
        }
        (ids, logprobs)
    }
}

/// A codec, its prior, and documents with what they decode to.
struct Subject {
    config: CompactConfig,
    codec: Compact,
    prior: Option<Vec<u8>>,
    documents: Vec<(Vec<u8>, usize, Rows)>,
}

#[derive(Clone, PartialEq)]
struct Rows {
    ids: Vec<i64>,
    logprobs: Vec<u32>,
}

fn subjects(random: &mut Random) -> Result<Vec<Subject>, CodecError> {
    let mut subjects = Vec::new();
    for adaptive in ["", r#""threshold": 0.01, "#] {
        let json = format!(r#"{{"vocab_size": {VOCAB}, "k": {K}, {adaptive}"step": 0.02}}"#);
        let config = CompactConfig::from_json(&json)?;
        let (ids, logprobs) = random.rows(400);
        let prior = learn(&config, &ids, &logprobs, K, None)?.to_bytes();
        for prior in [None, Some(prior)] {
            let codec = Compact::new(config.clone(), prior.as_deref())?;
            let mut documents = Vec::new();
            for rows in ROWS {
                let (ids, logprobs) = random.rows(rows);
                let data = codec.encode_document(&ids, &logprobs, K)?;
                let decoded = decode(&codec, &data, rows)?;
                documents.push((data, rows, decoded));
            }
            subjects.push(Subject { config: config.clone(), codec, prior, documents });
        }
    }
    Ok(subjects)
}

fn decode(codec: &Compact, data: &[u8], rows: usize) -> Result<Rows, CodecError> {
    let (mut ids, mut logprobs) = (vec![-1; rows * K], vec![1.0; rows * K]);
    codec.decode_document(data, &mut ids, &mut logprobs)?;
    Ok(Rows { ids, logprobs: logprobs.into_iter().map(f32::to_bits).collect() })
}

/// Why rows are none, if they are not.
fn fault(rows: &Rows) -> Option<&'static str> {
    for (ids, logprobs) in rows.ids.chunks(K).zip(rows.logprobs.chunks(K)) {
        let logprobs: Vec<f32> = logprobs.iter().map(|&bits| f32::from_bits(bits)).collect();
        let count = logprobs.iter().take_while(|&&logprob| logprob > f32::NEG_INFINITY).count();
        if count == 0 || ids.iter().any(|id| !(0..VOCAB as i64).contains(id)) {
            return Some("an id does not exist");
        }
        if (1..count).any(|place| ids[..place].contains(&ids[place])) {
            return Some("an id occurs twice");
        }
        let ordered = logprobs.windows(2).all(|pair| pair[0] >= pair[1]);
        let total: f64 = logprobs.iter().map(|&logprob| f64::from(logprob).exp()).sum();
        if !ordered || total > 1.0 + 1e-5 {
            return Some("its probabilities are not in order, or sum to more than 1");
        }
    }
    None
}

/// Changes some of the bytes, or how many there are.
fn damage(random: &mut Random, data: &mut Vec<u8>, other: &[u8]) {
    for _ in 0..=random.below(4) {
        let at = random.below(data.len());
        match random.below(8) {
            0..3 if !data.is_empty() => data[at] ^= 1 << random.below(8),
            3 if !data.is_empty() => data[at] = random.next() as u8,
            4 => data.truncate(at),
            5 => data.insert(at, random.next() as u8),
            6 => {
                data.truncate(at);
                data.extend_from_slice(&other[random.below(other.len())..]);
            }
            7 => {
                let end = data.len().min(at + random.below(9));
                data[at..end].iter_mut().for_each(|byte| *byte = random.next() as u8);
            }
            _ => {}
        }
    }
}

fn correct(data: &mut [u8]) {
    if let Some((stored, rest)) = data.split_first_chunk_mut::<4>() {
        *stored = checksum(rest).to_le_bytes();
    }
}

/// What became of inputs.
#[derive(Default)]
struct Counts {
    refused: u64,
    same: u64,
    other: u64,
    priors_refused: u64,
    priors: u64,
}

fn is_damage(error: &CodecError) -> bool {
    matches!(error, CodecError::Corrupt(_) | CodecError::Truncated { .. })
}

/// One input; why it is a fault of the codec, if it is.
fn check_document(
    random: &mut Random,
    subject: &Subject,
    input: &mut Vec<u8>,
    counts: &mut Counts,
) -> Result<(), String> {
    let (document, rows, decoded) = &subject.documents[random.below(subject.documents.len())];
    let mut rows = *rows;
    let other = &subject.documents[random.below(subject.documents.len())].0;
    input.clone_from(document);
    let is_corrected = match random.below(8) {
        // A frame, and then anything.
        0 => {
            input.truncate(6 + random.below(6));
            let length = random.below(64);
            input.extend((0..length).map(|_| random.next() as u8));
            true
        }
        1 | 2 => {
            damage(random, input, other);
            false
        }
        _ => {
            damage(random, input, other);
            true
        }
    };
    if is_corrected {
        correct(input);
    } else if random.below(16) == 0 {
        rows = random.below(200);
    }
    match decode(&subject.codec, input, rows) {
        Err(error) if is_damage(&error) => counts.refused += 1,
        Err(error) => return Err(format!("the error does not say that it is damaged: {error}")),
        Ok(found) if found == *decoded => counts.same += 1,
        // Spliced from its first byte on, an input may be another document as it was written.
        Ok(found)
            if subject.documents.iter().any(|(data, _, own)| *data == *input && *own == found) =>
        {
            counts.same += 1;
        }
        Ok(_) if !is_corrected => return Err("other rows, with the checksum right".to_owned()),
        Ok(found) => {
            if let Some(fault) = fault(&found) {
                return Err(fault.to_owned());
            }
            counts.other += 1;
        }
    }
    Ok(())
}

fn check_prior(
    random: &mut Random,
    subject: &Subject,
    input: &mut Vec<u8>,
    counts: &mut Counts,
) -> Result<(), String> {
    let Some(prior) = &subject.prior else { return Ok(()) };
    input.clone_from(prior);
    damage(random, input, prior);
    let codec = match Compact::new(subject.config.clone(), Some(input)) {
        Ok(codec) => codec,
        // A configuration that was changed is another one.
        Err(error) if is_damage(&error) || matches!(error, CodecError::Config { .. }) => {
            counts.priors_refused += 1;
            return Ok(());
        }
        Err(error) => return Err(format!("the error does not say that it is damaged: {error}")),
    };
    counts.priors += 1;
    for (document, rows, _) in &subject.documents {
        match decode(&codec, document, *rows) {
            Err(error) if is_damage(&error) => {}
            Err(error) => {
                return Err(format!("the error does not say that it is damaged: {error}"));
            }
            Ok(found) => {
                if let Some(fault) = fault(&found) {
                    return Err(fault.to_owned());
                }
            }
        }
    }
    Ok(())
}

/// The number after an argument.
fn argument(name: &str, default: u64) -> Result<u64, String> {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    match (arguments.next(), arguments.next()) {
        (None, _) => Ok(default),
        (_, Some(number)) => number.parse().map_err(|_| format!("{name} {number}: not a number")),
        _ => Err(format!("{name}: expected a number")),
    }
}

fn run() -> Result<(), String> {
    let inputs = argument("--inputs", 1_000_000)?;
    let mut random = Random(argument("--seed", 1)?.max(1));
    let subjects = subjects(&mut random).map_err(|error| error.to_string())?;
    let mut counts = Counts::default();
    let mut input = Vec::new();
    let start = Instant::now();
    for number in 1..=inputs {
        let subject = &subjects[random.below(subjects.len())];
        let check = if number % PRIORS == 0 { check_prior } else { check_document };
        let checked =
            catch_unwind(AssertUnwindSafe(|| check(&mut random, subject, &mut input, &mut counts)));
        let fault = match checked {
            Ok(Ok(())) => None,
            Ok(Err(fault)) => Some(fault),
            Err(_) => Some("a panic".to_owned()),
        };
        if let Some(fault) = fault {
            return Err(format!("input {number}: {fault}\n{:?}\n{input:02x?}", subject.config));
        }
        if number % 1_000_000 == 0 || number == inputs {
            let Counts { refused, same, other, priors_refused, priors } = &counts;
            println!(
                "{number} inputs in {:.0} s: documents {refused} refused, {same} the same, {other} \
                 valid rows; priors {priors_refused} refused, {priors} valid",
                start.elapsed().as_secs_f64()
            );
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            eprintln!("{fault}");
            ExitCode::FAILURE
        }
    }
}
