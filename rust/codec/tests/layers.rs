//! The order of the modules: each imports only from those before it, so there are no circles, and
//! what decodes does not know the encoder.

use std::fs;
use std::path::{Path, PathBuf};

/// Modules at the top, from the bottom up. Modules of one line do not know each other.
const LAYERS: [&[&str]; 11] = [
    &["error"],
    &["simd"],
    &["bits", "fidelity", "float"],
    &["config"],
    &["values"],
    &["encoder", "format"],
    &["rows"],
    &["tasks"],
    &["compact", "topk"],
    &["draws", "retokenize"],
    &["codec"],
];

/// Modules of the encoder, in the same order.
const ENCODER: [&[&str]; 10] = [
    &["row", "linalg"],
    &["column_sums", "coefficients", "joint_rounding"],
    &["solver", "rounding"],
    &["active_set"],
    &["plan"],
    &["mass"],
    &["residuals"],
    &["repair"],
    &["group_check"],
    &["mod"],
];

fn source() -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "src"].iter().collect()
}

/// The Rust files in a folder and the folders in it.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("readable"));
    let files = entries
        .map(|entry| entry.path())
        .flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] });
    files.filter(|path| path.extension().is_some_and(|extension| extension == "rs")).collect()
}

/// The modules that follow `prefix` anywhere in the text.
fn mentioned<'a>(text: &'a str, prefix: &str) -> Vec<&'a str> {
    let rest = text.split(prefix).skip(1);
    let end = |rest: &str| rest.find(|c: char| !c.is_alphanumeric() && c != '_');
    rest.map(|rest| &rest[..end(rest).unwrap_or(rest.len())]).collect()
}

fn layer(layers: &[&[&str]], module: &str) -> Option<usize> {
    layers.iter().position(|layer| layer.contains(&module))
}

/// Checks that `module` mentions only itself and lower ones.
fn check(layers: &[&[&str]], module: &str, mentioned: &[&str]) {
    let own = layer(layers, module).unwrap_or_else(|| unreachable!("{module} has no layer"));
    for other in mentioned {
        let below = layer(layers, other).is_none_or(|other| other < own);
        assert!(below || *other == module, "{module} imports {other}, which is not below it");
    }
}

#[test]
fn modules_import_only_from_lower_layers() {
    let mut checked = 0;
    for path in files(&source()) {
        let inside = path.strip_prefix(source()).expect("a file of the crate");
        let first = inside.components().next().expect("a name").as_os_str().to_string_lossy();
        let module = first.trim_end_matches(".rs");
        if module == "lib" {
            continue;
        }
        let text = fs::read_to_string(&path).expect("text");
        check(&LAYERS, module, &mentioned(&text, "crate::"));
        checked += 1;
    }
    assert!(checked > 25, "{checked} files");
}

#[test]
fn the_steps_of_the_encoder_form_no_circle() {
    let all = files(&source().join("encoder"));
    let steps = all.into_iter().filter(|path| !path.ends_with("testing.rs"));
    let paths: Vec<PathBuf> = steps.collect();
    assert_eq!(paths.len(), ENCODER.concat().len());
    for path in paths {
        let module = path.file_stem().expect("a name").to_string_lossy();
        let text = fs::read_to_string(&path).expect("text");
        // What is mentioned in tests and links does not count.
        let imports: Vec<&str> = text.lines().filter(|line| line.starts_with("use ")).collect();
        check(&ENCODER, &module, &mentioned(&imports.join("\n"), "super::"));
    }
}
