//! A document's rows: what each border of the teacher's tokens does to its row, and then the
//! student's rows one by one.

use std::ops::Range;

use super::border::Prefix;
use super::mapping::probabilities;
use super::{NONE, Start, Strings, TokenMap, Tokenize};
use crate::error::{CodecError, Result};
use crate::simd::Backend;
use crate::simd::doubles::{exp, ln, sum};

/// The byte that special tokens begin with.
const MARK: u8 = 0xff;
/// Of entries that are less probable, it is not asked what becomes of them if they cross a border:
/// they change the student's token before, and to what is not known. All of a row's are far less
/// than what it does not store.
const LEAST_ASKED: f64 = 1e-5;

/// The tokens of a document on one side, and the bytes of the teacher's text that each covers.
///
/// The teacher's tokens cover all of it. Those of the student that stand for nothing in it have −1.
#[derive(Debug, Clone, Copy)]
pub struct Tokens<'a> {
    /// (L)
    pub ids: &'a [i64],
    /// (L) where each begins.
    pub starts: &'a [i64],
    /// (L) where each ends.
    pub ends: &'a [i64],
}

/// A document in the tokens of both, and its teacher's rows.
#[derive(Debug, Clone, Copy)]
pub struct Document<'a> {
    /// In the teacher's tokens.
    pub teacher: Tokens<'a>,
    /// In the student's tokens.
    pub student: Tokens<'a>,
    /// (R, `width`) ids; row t is over token t + 1.
    pub ids: &'a [i64],
    /// (R, `width`) log-probabilities, −inf at places without an id.
    pub logprobs: &'a [f32],
    /// Places of a row.
    pub width: usize,
    /// (L − 1) the log-probability of each next token of the teacher, where it was kept.
    pub labels: Option<&'a [f32]>,
}

/// Where a student's position lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// The teacher says nothing of it.
    NoRow,
    /// At the beginning of a teacher's token.
    Aligned,
    /// Within one.
    Inside,
}

/// Sums over a document.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sums {
    /// Probability of the stored ids of the teacher's rows that are over a token of the text.
    pub teacher_mass: f64,
    /// How many these are.
    pub teacher_rows: f64,
    /// Bits that these take for the teacher's tokens.
    pub teacher_bits: f64,
    /// Bytes of these tokens.
    pub teacher_bytes: f64,
    /// The same of the student's rows that are aligned or inside.
    pub student_mass: f64,
    /// How many these are.
    pub student_rows: f64,
    /// Bits that these take for the student's tokens.
    pub student_bits: f64,
    /// Bytes of these tokens.
    pub student_bytes: f64,
}

/// The student's rows of a document.
#[derive(Debug, Clone, PartialEq)]
pub struct Mapped {
    /// (R, `keep`) ids, the most probable first.
    pub ids: Vec<i64>,
    /// (R, `keep`) log-probabilities, −inf at places without an id.
    pub logprobs: Vec<f32>,
    /// (R) the log-probability of each next token, before rows were cut to `keep` ids.
    pub labels: Vec<f32>,
    /// (R)
    pub kinds: Vec<Kind>,
    /// Over the document.
    pub sums: Sums,
}

/// A teacher's row, at the border between its tokens t and t + 1.
#[derive(Debug)]
struct Border {
    /// The student's token that covers the byte before the border, and how it begins.
    before: Option<(usize, Prefix)>,
    /// Its entries whose tokens may cross the border, in `Rows::crossing`.
    crossing: Range<usize>,
    /// Its entries whose tokens may begin with the true one, in `Rows::longer`.
    longer: Range<usize>,
    /// Probability of the true token.
    truth: f64,
    /// Probability of the ids that are not stored, other than the true token.
    missing: f64,
    /// How many ids that are.
    others: f64,
    /// Probability of the other ids that do not cross the border.
    keeping: f64,
}

/// The teacher's rows of a document, by their entries.
struct Rows {
    p: Vec<f64>,
    /// The first piece of those that do not cross their border; `NONE` also for the true token.
    pieces: Vec<u32>,
    crosses: Vec<bool>,
    crossing: Vec<usize>,
    longer: Vec<usize>,
    borders: Vec<Border>,
}

/// How many of the bytes that a token covers are text: none of a special token's, which begin with
/// a byte that no text has.
fn text_bytes(token: &[u8], covered: i64) -> f64 {
    if token.first() == Some(&MARK) { 0.0 } else { covered as f64 }
}

/// What an outcome of this probability takes.
fn bits(p: f64) -> f64 {
    -ln(p.max(f64::MIN_POSITIVE)) * std::f64::consts::LOG2_E
}

impl TokenMap {
    /// The student's rows of a document: R = L − 1 of `keep` places. With `fill`, places without an
    /// id get one with an even share of the missing mass.
    pub fn map(
        &mut self,
        document: &Document<'_>,
        (keep, fill): (usize, bool),
        tokenize: &mut Tokenize<'_>,
    ) -> Result<Mapped> {
        self.check(document)?;
        let backend = Backend::from_env()?;
        let rows = self.borders_of(backend, document, tokenize)?;
        let count = document.student.ids.len().saturating_sub(1);
        let mut mapped = Mapped {
            ids: vec![0; count * keep],
            logprobs: vec![f32::NEG_INFINITY; count * keep],
            labels: vec![0.0; count],
            kinds: vec![Kind::NoRow; count],
            sums: Sums::default(),
        };
        let mut place = 0;
        for position in 0..count {
            let next = document.student.ids[position + 1] as u32;
            let (kind, total) = self.add_row(document, &rows, position, &mut place);
            if kind == Kind::NoRow {
                // Nothing is known: every id is as likely as any other.
                self.mapping.add(next, 1.0 / self.student.len() as f64);
            }
            let label = self.mapping.complete(backend, total, next).min(1.0);
            let out = position * keep..(position + 1) * keep;
            let (ids, logprobs) = (&mut mapped.ids[out.clone()], &mut mapped.logprobs[out]);
            let (mass, written) = self.mapping.write(backend, (ids, logprobs), next);
            if fill {
                self.mapping.fill(ids, logprobs, mass);
            }
            mapped.labels[position] = libm::log(label) as f32;
            mapped.kinds[position] = kind;
            if kind != Kind::NoRow {
                let (start, end) =
                    (document.student.starts[position + 1], document.student.ends[position + 1]);
                let p = if document.labels.is_some() { label } else { written };
                mapped.sums.student_mass += mass;
                mapped.sums.student_rows += 1.0;
                mapped.sums.student_bits += bits(p);
                mapped.sums.student_bytes += text_bytes(self.student.get(next), end - start);
            }
        }
        self.count_teacher(document, &rows, &mapped.kinds, &mut mapped.sums);
        Ok(mapped)
    }

    fn check(&self, document: &Document<'_>) -> Result<()> {
        let Document { teacher, student, .. } = document;
        let tokens = teacher.ids.len();
        let rows = document.ids.len() / document.width.max(1);
        let fits = |side: &Tokens<'_>, strings: &Strings| {
            side.starts.len() == side.ids.len()
                && side.ends.len() == side.ids.len()
                && side.ids.iter().zip(side.starts.iter().zip(side.ends)).all(
                    |(&id, (&start, &end))| {
                        let known = (0..strings.len() as i64).contains(&id);
                        // No more bytes than the token has; a token may also stand for nothing in the text.
                        known
                            && (-1..=end).contains(&start)
                            && (end - start) as usize <= strings.get(id as u32).len()
                    },
                )
        };
        let whole =
            teacher.starts.iter().skip(1).eq(teacher.ends.iter().take(tokens.saturating_sub(1)))
                && teacher.starts.first().is_none_or(|&start| start == 0);
        let complete = rows + 1 >= tokens
            && document.ids.len() == rows * document.width
            && document.logprobs.len() == document.ids.len()
            && document.labels.is_none_or(|labels| labels.len() + 1 == tokens);
        if fits(teacher, &self.teacher) && fits(student, &self.student) && whole && complete {
            return Ok(());
        }
        Err(CodecError::Input(format!(
            "a document of {tokens} and {} tokens, with {rows} rows: its ids, the bytes that they cover and its rows \
             do not fit each other",
            student.ids.len()
        )))
    }

    // -- the teacher's rows ------------------------------------------------------------------------

    /// What is to be known of each row, with which of its tokens may cross its border.
    fn borders_of(
        &mut self,
        backend: Backend,
        document: &Document<'_>,
        tokenize: &mut Tokenize<'_>,
    ) -> Result<Rows> {
        let Document { teacher, student, width, .. } = *document;
        let count = teacher.ids.len().saturating_sub(1);
        let used = count * width;
        let mut rows = Rows {
            p: probabilities(backend, &document.logprobs[..used], width),
            pieces: vec![NONE; used],
            crosses: vec![false; used],
            crossing: Vec::new(),
            longer: Vec::new(),
            borders: Vec::with_capacity(count),
        };
        let before = self.tokens_before(&teacher, &student, count);
        self.borders
            .learn_prefixes(before.iter().flatten().map(|&(_, prefix)| prefix), tokenize)?;
        let mut pairs = Vec::new();
        let mut heads = Vec::with_capacity(width);
        for (row, before) in before.into_iter().enumerate() {
            let places = row * width..(row + 1) * width;
            let truth = teacher.ids[row + 1];
            let true_start = self.heads[truth as usize].start;
            let true_mask = Start::mask(self.teacher.get(truth as u32).len());
            let (crossing, longer) = (rows.crossing.len(), rows.longer.len());
            let (mut stored, mut keeping, mut total, mut entries) = (None, 0.0, 0.0, 0_usize);
            // All at once, since they are all over the memory. An id of a padded head stands for
            // nothing: its mass is missing.
            let ids = &document.ids[places.clone()];
            heads.clear();
            heads.extend(ids.iter().map(|&id| self.heads.get(id as usize).copied()));
            for (place, &head) in places.zip(&heads) {
                let (id, p) = (document.ids[place], rows.p[place]);
                let (Some(head), true) = (head, p > 0.0) else { continue };
                total += p;
                entries += 1;
                if id == truth {
                    stored = Some(p);
                    continue;
                }
                if head.start.may_begin_with(true_start, true_mask) {
                    rows.longer.push(place);
                }
                if let Some((_, prefix)) = before
                    && self.borders.may_cross(prefix, head)
                {
                    rows.crosses[place] = true;
                    rows.crossing.push(place);
                    if p >= LEAST_ASKED {
                        pairs.push((prefix, id as u32));
                    }
                } else {
                    rows.pieces[place] = head.piece();
                    keeping += p;
                }
            }
            let left = (1.0 - total).max(0.0);
            let others = (self.teacher.len() - entries) as f64;
            let given = document.labels.map(|labels| exp(f64::from(labels[row])).min(left));
            // Nothing is known of the ids that are not stored, so they are taken to be equally likely.
            let truth = stored.or(given).unwrap_or(left / others.max(1.0));
            let (missing, others) = if stored.is_some() {
                (left, others)
            } else {
                ((left - truth).max(0.0), (others - 1.0).max(0.0))
            };
            let crossing = crossing..rows.crossing.len();
            let longer = longer..rows.longer.len();
            rows.borders.push(Border { before, crossing, longer, truth, missing, others, keeping });
        }
        self.borders.learn_pairs(&pairs, &self.teacher, tokenize)?;
        Ok(rows)
    }

    /// Of each row, the student's token before its border and how it begins.
    fn tokens_before(
        &mut self,
        teacher: &Tokens<'_>,
        student: &Tokens<'_>,
        count: usize,
    ) -> Vec<Option<(usize, Prefix)>> {
        let mut own = 0;
        let mut found = Vec::with_capacity(count);
        for &border in &teacher.ends[..count] {
            while own < student.ids.len() && student.ends[own] < border {
                own += 1;
            }
            let inside = own < student.ids.len() && (0..border).contains(&student.starts[own]);
            found.push(inside.then(|| {
                let id = student.ids[own] as u32;
                // A token's first byte may not be in the text: the space before a document.
                let length = self.student.get(id).len() - (student.ends[own] - border) as usize;
                (own, self.borders.prefix(&self.student, id, length))
            }));
        }
        found
    }

    /// The tokens of the bytes before a border and an entry's: those from the student's token before
    /// the border on. None if these bytes keep the border.
    fn crossed(&self, border: &Border, id: i64) -> &[u32] {
        border.before.map_or(&[][..], |(_, prefix)| self.borders.tokens_of(prefix, id as u32))
    }

    // -- the student's rows ------------------------------------------------------------------------

    /// Adds up the probabilities of the token after a position, and returns that of all that can
    /// follow there. `place` is that of the row for the position before.
    fn add_row(
        &mut self,
        document: &Document<'_>,
        rows: &Rows,
        position: usize,
        place: &mut usize,
    ) -> (Kind, f64) {
        let Document { teacher, student, .. } = *document;
        let (at, end) = (student.starts[position + 1], student.ends[position + 1]);
        if at < 0 || end <= at || rows.borders.is_empty() || teacher.ends[0] > at {
            return (Kind::NoRow, 1.0);
        }
        *place = if teacher.ends[*place] > at { 0 } else { *place };
        while *place + 1 < rows.borders.len() && teacher.ends[*place + 1] <= at {
            *place += 1;
        }
        let border = teacher.ends[*place];
        if at >= teacher.ends[*place + 1] {
            return (Kind::NoRow, 1.0);
        }
        let kind = if at == border { Kind::Aligned } else { Kind::Inside };
        if kind == Kind::Inside && rows.borders[*place].before.is_none() {
            return (Kind::NoRow, 1.0);
        }
        // Entries of the row before may go on beyond this border. They share the probability with
        // its true token, after which this row comes.
        let (mut longer, mut weight) = (0.0, 1.0);
        if let Some(row) = place.checked_sub(1)
            && !rows.borders[row].longer.is_empty()
        {
            let places = rows.longer[rows.borders[row].longer.clone()].iter().copied();
            (longer, _) = self.add_begun(document, rows, row, places, (position, 1.0));
            weight = if longer > 0.0 { rows.borders[row].truth } else { 1.0 };
        }
        let total = if kind == Kind::Aligned {
            self.add_aligned(document, rows, *place, weight)
        } else {
            self.add_inside(document, rows, *place, (position, weight))
        };
        self.add_truth(document, rows, *place, (position, weight));
        (kind, longer + weight * total)
    }

    /// Adds the first pieces of all entries but the true token. Returns the probability of what can
    /// follow here: all but the entries that would have changed the student's token before. What is
    /// added is multiplied by the weight, what is returned is not.
    fn add_aligned(
        &mut self,
        document: &Document<'_>,
        rows: &Rows,
        row: usize,
        weight: f64,
    ) -> f64 {
        let border = &rows.borders[row];
        let places = row * document.width..(row + 1) * document.width;
        for (&piece, &p) in rows.pieces[places.clone()].iter().zip(&rows.p[places]) {
            if piece != NONE {
                self.mapping.add(piece, weight * p);
            }
        }
        let mut total = 1.0;
        let own = border.before.map(|(own, _)| document.student.ids[own] as u32);
        for &place in &rows.crossing[border.crossing.clone()] {
            let p = rows.p[place];
            let tokens =
                if p < LEAST_ASKED { &[][..] } else { self.crossed(border, document.ids[place]) };
            if tokens.first().copied() != own {
                total -= p;
            } else if let Some(&piece) = tokens.get(1) {
                self.mapping.add(piece, weight * p);
            }
        }
        total
    }

    /// Adds, of the entries that begin with the bytes read since the border, the pieces that come
    /// next. Returns the probability of all that begin so, the true token with it.
    fn add_inside(
        &mut self,
        document: &Document<'_>,
        rows: &Rows,
        row: usize,
        (position, weight): (usize, f64),
    ) -> f64 {
        let border = &rows.borders[row];
        let places = row * document.width..(row + 1) * document.width;
        let (total, beginning) = self.add_begun(document, rows, row, places, (position, weight));
        let begun = self.begun_by(&self.read_since(document, row, position));
        let unstored = begun.saturating_sub(beginning + 1);
        border.truth + total + border.missing * unstored as f64 / border.others.max(1.0)
    }

    /// The bytes of the text between a row's border and a position.
    fn read_since(&self, document: &Document<'_>, row: usize, position: usize) -> Vec<u8> {
        let mut left =
            (document.student.starts[position + 1] - document.teacher.ends[row]) as usize;
        let mut read = Vec::with_capacity(left);
        for &id in &document.teacher.ids[row + 1..] {
            let token = self.teacher.get(id as u32);
            let length = left.min(token.len());
            read.extend_from_slice(&token[..length]);
            left -= length;
            if left == 0 {
                break;
            }
        }
        read
    }

    /// Adds, of these entries of a row but the true token that begin with the bytes read since its
    /// border and go on, the pieces that come next. Returns the probability of all that begin so, and how
    /// many they are; none if the student's tokens there are not known.
    fn add_begun(
        &mut self,
        document: &Document<'_>,
        rows: &Rows,
        row: usize,
        places: impl Iterator<Item = usize>,
        (position, weight): (usize, f64),
    ) -> (f64, usize) {
        let border = &rows.borders[row];
        let begun = self.read_since(document, row, position);
        let (start, mask) = (Start::of(&begun), Start::mask(begun.len()));
        let (Some((own, _)), false) = (border.before, begun.is_empty()) else { return (0.0, 0) };
        let student = &document.student;
        let aligned = student.ends[own] == document.teacher.ends[row];
        let since = &student.ids[own..=position];
        let whole = Start::is_whole(&begun);
        let truth = document.teacher.ids[row + 1];
        let (mut total, mut beginning) = (0.0, 0);
        for place in places {
            let (id, p) = (document.ids[place], rows.p[place]);
            if p == 0.0 || id == truth {
                continue;
            }
            let begins = self.heads.get(id as usize).is_some_and(|head| {
                head.start.may_begin_with(start, mask)
                    && (whole || self.teacher.get(id as u32).starts_with(&begun))
            });
            if !begins {
                continue;
            }
            beginning += 1;
            let (pieces, expected) = if rows.crosses[place] {
                if p < LEAST_ASKED {
                    continue;
                }
                (self.crossed(border, id), since)
            } else if aligned {
                (self.pieces[id as usize].as_slice(), &since[1..])
            } else {
                continue;
            };
            if pieces.iter().zip(expected).any(|(&piece, &own)| i64::from(piece) != own) {
                continue;
            }
            total += p;
            if let Some(&piece) = pieces.get(expected.len()) {
                self.mapping.add(piece, weight * p);
            }
        }
        (total, beginning)
    }

    /// Adds the true token of a row: to the student's next token if that ends within it. If not,
    /// what the rows that follow say of the text after it.
    fn add_truth(
        &mut self,
        document: &Document<'_>,
        rows: &Rows,
        row: usize,
        (position, weight): (usize, f64),
    ) {
        let (next, end) =
            (document.student.ids[position + 1] as u32, document.student.ends[position + 1]);
        let mut p = weight * rows.borders[row].truth;
        let mut row = row;
        while end >= document.teacher.ends[row + 1] {
            row += 1;
            let Some(border) = rows.borders.get(row) else { break };
            for &place in &rows.crossing[border.crossing.clone()] {
                if rows.p[place] < LEAST_ASKED {
                    continue;
                }
                if let Some(&piece) = self.crossed(border, document.ids[place]).first() {
                    self.mapping.add(piece, p * rows.p[place]);
                }
            }
            if end == document.teacher.ends[row] {
                // The true token, and what is not stored, keep the border.
                p *= border.keeping + border.truth + border.missing;
                break;
            }
            if let Some((_, prefix)) = border.before
                && let Some(piece) = self.borders.first_of(prefix)
            {
                self.mapping.add(piece, p * border.keeping);
            }
            p *= border.truth;
        }
        self.mapping.add(next, p);
    }

    /// Counts what the teacher's rows take for the bytes of which the student has rows.
    fn count_teacher(&self, document: &Document<'_>, rows: &Rows, kinds: &[Kind], sums: &mut Sums) {
        let (teacher, student) = (&document.teacher, &document.student);
        let mut position = 0;
        for (row, border) in rows.borders.iter().enumerate() {
            let (start, end) = (teacher.starts[row + 1], teacher.ends[row + 1]);
            while position < kinds.len() && student.ends[position + 1] <= start {
                position += 1;
            }
            let begins = position < kinds.len()
                && kinds[position] != Kind::NoRow
                && student.starts[position + 1] <= start;
            if !begins || end <= start {
                continue;
            }
            sums.teacher_mass += sum(&rows.p[row * document.width..(row + 1) * document.width]);
            sums.teacher_rows += 1.0;
            sums.teacher_bits += bits(border.truth);
            sums.teacher_bytes +=
                text_bytes(self.teacher.get(teacher.ids[row + 1] as u32), end - start);
        }
    }
}
