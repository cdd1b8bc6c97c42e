//! Developer tasks: `cargo run -p xtask -- layers`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Folders from bottom to top. A crate may depend only on crates of its own folder or of lower ones.
const LAYERS: [&str; 4] = ["core", "engines", "homes", "vmm"];

/// Folders whose crates may use everything: tests, benchmarks, tasks.
const TOP: [&str; 4] = ["tests", "bench", "xtask", "fuzz"];

/// Crate names that say nothing.
const BANNED: [&str; 5] = ["util", "utils", "common", "manager", "helper"];

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("layers") => layers(),
        _ => {
            eprintln!("usage: xtask layers   check that dependencies go only downwards");
            ExitCode::from(2)
        }
    }
}

fn layer_of(path: &Path) -> Option<usize> {
    let top = path.components().next()?.as_os_str().to_str()?;
    if TOP.contains(&top) {
        return Some(LAYERS.len());
    }
    LAYERS.iter().position(|l| *l == top)
}

/// Manifests below `dir`, relative to `root`.
fn manifests(root: &Path, dir: &Path, out: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        let name = entry.file_name();
        if path.is_dir() && name != "target" && !name.to_string_lossy().starts_with('.') {
            manifests(root, &path, out);
        } else if name == "Cargo.toml"
            && let Ok(relative) = path.strip_prefix(root)
        {
            out.push(relative.to_path_buf());
        }
    }
}

/// The package name and the names in `[dependencies]` of a manifest.
fn parse(text: &str) -> Option<(String, Vec<String>)> {
    let (mut section, mut name, mut deps) = (String::new(), None, Vec::new());
    for line in text.lines() {
        let line = line.trim();
        if line.starts_with('[') {
            section = line.trim_matches(['[', ']']).to_owned();
            if let Some(dep) = section.strip_prefix("dependencies.") {
                deps.push(dep.to_owned());
            }
        } else if let Some((key, value)) = line.split_once('=') {
            let key = key.trim();
            if section == "package" && key == "name" {
                name = Some(value.trim().trim_matches('"').to_owned());
            } else if section == "dependencies" {
                deps.push(key.split('.').next().unwrap_or(key).to_owned());
            }
        }
    }
    name.map(|n| (n, deps))
}

fn layers() -> ExitCode {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut files = Vec::new();
    manifests(&root, &root, &mut files);
    let mut crates = BTreeMap::new();
    for file in files {
        let Ok(text) = std::fs::read_to_string(root.join(&file)) else {
            continue;
        };
        if let Some((name, deps)) = parse(&text) {
            crates.insert(name, (file, deps));
        }
    }
    let mut wrong = 0;
    for (name, (file, deps)) in &crates {
        if BANNED.contains(&name.as_str()) {
            eprintln!("{}: the name '{name}' says nothing", file.display());
            wrong += 1;
        }
        let Some(mine) = layer_of(file) else { continue };
        for dep in deps {
            let Some((other, _)) = crates.get(dep) else {
                continue;
            };
            if layer_of(other).is_some_and(|theirs| theirs > mine) {
                eprintln!(
                    "{}: '{name}' may not depend on '{dep}', which is above it",
                    file.display()
                );
                wrong += 1;
            }
        }
    }
    if crates.is_empty() {
        eprintln!(
            "{}: no crates here: build xtask again where it is run",
            root.display()
        );
        return ExitCode::FAILURE;
    }
    println!("layers: {} crates, {wrong} wrong arrows", crates.len());
    if wrong == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
