use super::*;

/// A cache with a guest in it whose files are what `kernel` and `initramfs` say.
fn filled(directory: &Path) -> (Cache, Manifest) {
    let cache = Cache::at(directory.join("cache")).unwrap();
    let source = |name: &str| Source {
        package: name.into(),
        version: "1".into(),
        deb: cache.store(name, name.as_bytes()).unwrap(),
    };
    let manifest = Manifest {
        recipe: recipe(),
        kernel_source: source("kernel.deb"),
        userland_source: source("busybox.deb"),
        kernel: cache.store("vmlinuz", b"kernel").unwrap(),
        initramfs: cache.store("initramfs", b"archive").unwrap(),
    };
    let text = serde_json::to_vec(&manifest).unwrap();
    cache.write(&cache.manifest_path(), &text).unwrap();
    (cache, manifest)
}

fn is_ready(cache: &Cache) -> bool {
    cache.ready().is_some()
}

#[test]
fn a_whole_cache_is_used_without_a_network() {
    let directory = tempfile::tempdir().unwrap();
    let (cache, _) = filled(directory.path());
    let guest = cache.guest(&Progress::new()).unwrap();
    assert_eq!(guest.initramfs, b"archive");
    assert_eq!(guest.kernel, b"kernel");
    assert_eq!(guest.kernel_package, "kernel.deb 1");
}

#[test]
fn damage_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let (cache, manifest) = filled(directory.path());
    assert!(is_ready(&cache));
    fs::write(cache.stored(&manifest.kernel), b"kernem").unwrap();
    assert!(!is_ready(&cache), "changed file");
    let (cache, manifest) = filled(directory.path());
    fs::remove_file(cache.stored(&manifest.initramfs)).unwrap();
    assert!(!is_ready(&cache), "missing file");
    let (cache, _) = filled(directory.path());
    fs::write(cache.manifest_path(), b"{\"recipe\":").unwrap();
    assert!(!is_ready(&cache), "cut manifest");
}

#[test]
fn another_versions_guest_is_made_anew_from_the_kept_packages() {
    let directory = tempfile::tempdir().unwrap();
    let (cache, mut manifest) = filled(directory.path());
    manifest.recipe = "other".into();
    fs::write(
        cache.manifest_path(),
        serde_json::to_vec(&manifest).unwrap(),
    )
    .unwrap();
    assert!(!is_ready(&cache));
    assert_eq!(
        cache.sources_in_store().unwrap(),
        [manifest.kernel_source, manifest.userland_source]
    );
}

#[test]
fn leftovers_are_removed() {
    let directory = tempfile::tempdir().unwrap();
    let (cache, manifest) = filled(directory.path());
    cache.store("old", b"old").unwrap();
    fs::create_dir(cache.directory.join("fetch-abc")).unwrap();
    fs::write(cache.directory.join(".tmpabc"), b"x").unwrap();
    cache.remove_unused(&manifest);
    assert_eq!(
        fs::read_dir(cache.directory.join("store")).unwrap().count(),
        4
    );
    assert!(!cache.directory.join("fetch-abc").exists());
    assert!(!cache.directory.join(".tmpabc").exists());
    assert!(is_ready(&cache));
}
