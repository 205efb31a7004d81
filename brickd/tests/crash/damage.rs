//! Damage by hand: each time the brick starts and nothing wrong is taken for right, or it refuses and says what to do.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mortar_brickd::store::{self, BrickId3, Opened, Record};
use mortar_brickd::tree::Tree;
use mortar_proto::metadata::state::{Directory, Inode, Node, State, Volume};
use mortar_proto::{BLOCK_BYTES, BrickId, ByteRange, ClusterId, EXTENT_BYTES, Ino, SetId, VolumeId};

use crate::play::object;
use crate::server::wait_for;

const INO: Ino = Ino(0x77);
const X: BrickId = BrickId(9);
const IDS: BrickId3 = BrickId3 { cluster: ClusterId(5), volume: VolumeId(2), brick: BrickId(4) };

/// What is done to a file, or a directory.
type Damage = fn(&Path);

fn open(root: &Path) -> anyhow::Result<Opened> {
    // Each time by a server that sees the brick for the first time.
    let server = tempfile::tempdir()?;
    store::open(root, server.path(), IDS, "v")
}

/// Opens a brick whose journal may still be on its way to its end, in a thread of its own.
fn open_again(root: &Path) -> Opened {
    let opened = open_in_doubt(root);
    store::make_sums_anew(&opened.objects, &opened.doubts).unwrap();
    opened
}

/// As [`open_again`], before it is settled what does not match its checksum.
fn open_in_doubt(root: &Path) -> Opened {
    wait_for("the brick to open", || open(root).ok())
}

/// A brick with ten blocks at the start of a file, and ten in its second extent; with an intent for the first only.
fn brick(root: &Path) {
    let opened = open(root).unwrap();
    opened.journal.add(vec![Record::Intent(INO, 0)]).unwrap();
    opened.objects.write(INO, 0, &[1; 40_960], &[]).unwrap();
    opened.objects.write(INO, EXTENT_BYTES, &[2; 40_960], &[]).unwrap();
    opened.objects.flush(INO).unwrap();
    drop(opened);
    drop(open_again(root));
}

fn edit(path: &Path) -> fs::File {
    OpenOptions::new().write(true).open(path).unwrap()
}

/// Copies a brick's directory, to damage the copy.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target)
        } else {
            fs::copy(entry.path(), target).map(|_| ()).unwrap()
        }
    }
}

#[test]
fn torn_checksums_are_made_anew_where_an_intent_is_and_told_of_where_none_is() {
    let damages: [(&str, Damage); 5] = [
        ("gone", |sums| fs::remove_file(sums).unwrap()),
        ("empty", |sums| edit(sums).set_len(0).unwrap()),
        ("of half a checksum", |sums| edit(sums).set_len(8 * 3 + 5).unwrap()),
        ("garbage", |sums| {
            edit(sums).write_all_at(&[0xab; 40], 17).unwrap();
            edit(sums).write_all_at(&[0xab; 40], EXTENT_BYTES / BLOCK_BYTES * 8 + 17).unwrap();
        }),
        ("longer than the data", |sums| {
            let end = (EXTENT_BYTES + 40_960) / BLOCK_BYTES * 8;
            edit(sums).write_all_at(&[0xab; 100], end + 1).unwrap();
        }),
    ];
    for (what, damage) in damages {
        let dir = tempfile::tempdir().unwrap();
        brick(dir.path());
        damage(&object(dir.path(), INO)[1]);
        let opened = open_again(dir.path());
        let unsound = |start| opened.objects.unsound(INO, ByteRange::at(start, 1 << 20)).unwrap();
        assert_eq!(unsound(0), [0_u64; 0], "checksums {what}: there is an intent");
        let told = !unsound(EXTENT_BYTES).is_empty() || !opened.objects.cut_off(INO).unwrap().is_empty();
        assert!(told, "checksums {what}: no intent is there, and nobody is told");
    }
}

#[test]
fn data_that_is_not_what_its_checksum_is_of_stays_in_doubt_where_an_intent_is_until_that_is_settled() {
    let dir = tempfile::tempdir().unwrap();
    brick(dir.path());
    let [data, sums] = &object(dir.path(), INO);
    for block in [2, 3, 7, EXTENT_BYTES / BLOCK_BYTES] {
        edit(data).write_all_at(b"changed", block * BLOCK_BYTES + 100).unwrap();
    }
    edit(sums).write_all_at(&[0; 8], 5 * 8).unwrap();
    let opened = open_in_doubt(dir.path());
    let doubted: Vec<_> = opened.doubts.iter().map(|(ino, blocks)| (*ino, blocks.iter().collect::<Vec<_>>())).collect();
    assert_eq!(doubted, [(INO, vec![2..4, 7..8])]);
    let unsound = || opened.objects.unsound(INO, ByteRange::at(0, 2 * EXTENT_BYTES)).unwrap();
    assert_eq!(unsound(), [2, 3, 7, EXTENT_BYTES / BLOCK_BYTES], "the checksums are still there");
    store::make_sums_anew(&opened.objects, &opened.doubts).unwrap();
    assert_eq!(unsound(), [EXTENT_BYTES / BLOCK_BYTES]);
}

#[cfg(feature = "leave-out")]
#[test]
fn without_s3_torn_checksums_are_taken_for_damage() {
    use mortar_proto::left_out::{Rule, leave_out};
    let dir = tempfile::tempdir().unwrap();
    brick(dir.path());
    edit(&object(dir.path(), INO)[1]).write_all_at(&[0xab; 40], 17).unwrap();
    leave_out(Some(Rule::S3));
    let opened = open_again(dir.path());
    leave_out(None);
    assert_ne!(opened.objects.unsound(INO, ByteRange::at(0, 1 << 20)).unwrap(), [0_u64; 0]);
}

#[test]
fn data_that_is_gone_is_told_of_where_no_intent_is() {
    let damages: [Damage; 2] = [|data| fs::remove_file(data).unwrap(), |data| edit(data).set_len(5000).unwrap()];
    for damage in damages {
        let dir = tempfile::tempdir().unwrap();
        brick(dir.path());
        damage(&object(dir.path(), INO)[0]);
        let opened = open_again(dir.path());
        opened.objects.ensure(INO).unwrap();
        let regions = opened.objects.cut_off(INO).unwrap();
        assert!(regions.contains(16), "{regions:?}");
    }
}

/// The journal's newest log.
fn newest_log(root: &Path) -> PathBuf {
    let entries = fs::read_dir(root.join(".mortar/state")).unwrap().map(|e| e.unwrap().path());
    entries.filter(|p| p.extension().is_some_and(|e| e == "log")).max().unwrap()
}

#[test]
fn a_log_torn_behind_what_was_made_durable_loses_nothing_of_that() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("brick");
    let opened = open(&root).unwrap();
    let log = newest_log(&root);
    let mut lengths = vec![fs::metadata(&log).unwrap().len()];
    for extent in 0..6 {
        opened.journal.add(vec![Record::Intent(INO, extent), Record::Missed(X, INO, extent..extent + 1)]).unwrap();
        lengths.push(fs::metadata(&log).unwrap().len());
    }
    assert!(lengths.windows(2).all(|l| l[0] < l[1]), "{lengths:?}");
    let (name, written) = (log.file_name().unwrap(), fs::read(&log).unwrap());
    for (durable, range) in lengths.windows(2).enumerate() {
        for cut in [range[0], range[0] + 1, range[0] + 9, (range[0] + range[1]) / 2, range[1] - 1] {
            for rest in [&[][..], &[0; 700], &[0xa5; 700]] {
                // A record that ends in zeroes is whole with zeroes in their place.
                if rest.starts_with(&written[cut as usize..range[1] as usize]) {
                    continue;
                }
                let left = dir.path().join("left");
                copy(&root, &left);
                let torn = edit(&left.join(".mortar/state").join(name));
                torn.set_len(cut).unwrap();
                torn.write_all_at(rest, cut).unwrap();
                let opened = open(&left).unwrap_or_else(|e| panic!("{cut} of {lengths:?}, {} more: {e:#}", rest.len()));
                let mut intents: Vec<u64> = opened.loaded.intents.iter().map(|(_, extent)| *extent).collect();
                intents.sort_unstable();
                let expected: Vec<u64> = (0..durable as u64).collect();
                assert_eq!(intents, expected, "{cut} of {lengths:?}, {} more", rest.len());
                let missed: u64 = opened.loaded.missed.iter().map(|(_, _, r)| r.end - r.start).sum();
                assert_eq!(missed, durable as u64);
                drop(opened);
                fs::remove_dir_all(&left).unwrap();
            }
        }
    }
}

#[test]
fn a_journal_that_is_gone_or_makes_no_sense_is_refused_with_what_to_do() {
    let damages: [Damage; 4] = [
        |state| fs::remove_dir_all(state).unwrap(),
        |state| fs::remove_file(state.join("CURRENT")).unwrap(),
        |state| fs::write(state.join("CURRENT"), b"nonsense").unwrap(),
        |state| {
            let manifest = |p: &PathBuf| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("MANIFEST"));
            fs::read_dir(state)
                .unwrap()
                .map(|e| e.unwrap().path())
                .filter(manifest)
                .for_each(|p| edit(&p).set_len(10).unwrap());
        },
    ];
    for damage in damages {
        let dir = tempfile::tempdir().unwrap();
        brick(dir.path());
        let left = dir.path().join("left");
        copy(&dir.path().join(".mortar"), &left.join(".mortar"));
        damage(&left.join(".mortar/state"));
        let refused = open(&left).err().map(|e| format!("{e:#}")).expect("it opens, and has forgotten everything");
        assert!(refused.contains("reset-brick") && refused.contains("left/.mortar/state"), "{refused}");
    }
}

#[test]
fn a_brick_that_says_nonsense_of_itself_is_refused() {
    for text in ["", "format = 1\n", "nonsense"] {
        let dir = tempfile::tempdir().unwrap();
        brick(dir.path());
        fs::write(dir.path().join(".mortar/brick.toml"), text).unwrap();
        let refused = open(dir.path()).err().map(|e| format!("{e:#}")).expect("it opens");
        assert!(refused.contains("brick.toml makes no sense"), "{refused}");
    }
}

/// A volume with one file, as the metadata log has it.
fn names(name: &str) -> State {
    let mut state = State::default();
    let (root, volume, set) = (Ino(3), IDS.volume, SetId(1));
    let inode = |node| Inode {
        volume,
        mode: 0o640,
        uid: 0,
        gid: 0,
        links: 1,
        atime_ns: 0,
        mtime_ns: 0,
        ctime_ns: 0,
        xattrs: Default::default(),
        opens: 0,
        node,
    };
    let mut directory = Directory::default();
    directory.entries.insert(name.into(), (INO, 0));
    state.inodes.insert(root, inode(Node::Directory(directory)));
    state.inodes.insert(INO, inode(Node::File { set, lease: Default::default() }));
    state
        .volumes
        .insert(volume, Volume { name: "v".into(), started: true, options: Default::default(), sets: vec![set], root });
    state
}

#[test]
fn names_and_objects_that_lack_each_other_are_mended_and_no_data_is_lost_by_it() {
    let number = |path: &Path| fs::metadata(path).unwrap().ino();
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    brick(root);
    let opened = open_again(root);
    let data = opened.objects.data_path(INO);
    let was = number(&data);
    let mend = || Tree::new(root, SetId(1), Arc::clone(&opened.objects)).mend(IDS.volume, &names("vm.img")).unwrap();
    // An object without its name.
    mend();
    assert_eq!(number(&root.join("vm.img")), was);
    // The name leads to another file, to a directory, and there is a name that nobody made.
    fs::remove_file(root.join("vm.img")).unwrap();
    fs::create_dir_all(root.join("vm.img/deep")).unwrap();
    fs::write(root.join("stray"), b"stray").unwrap();
    mend();
    assert_eq!(number(&root.join("vm.img")), was);
    assert!(!root.join("stray").exists());
    fs::remove_file(root.join("vm.img")).unwrap();
    fs::write(root.join("vm.img"), b"another").unwrap();
    mend();
    assert_eq!((number(&root.join("vm.img")), fs::metadata(&data).unwrap().len()), (was, EXTENT_BYTES + 40_960));
    // A name without its object, which its checksums know: it is the object.
    fs::remove_file(&data).unwrap();
    mend();
    assert_eq!((number(&root.join("vm.img")), number(&data)), (was, was));
    // An object that is gone and a name that leads to another file: that is not believed, and the file counts as cut off.
    drop(opened);
    fs::remove_file(&data).unwrap();
    fs::remove_file(root.join("vm.img")).unwrap();
    fs::write(root.join("vm.img"), b"another").unwrap();
    let opened = open_again(root);
    Tree::new(root, SetId(1), Arc::clone(&opened.objects)).mend(IDS.volume, &names("vm.img")).unwrap();
    assert_eq!(number(&root.join("vm.img")), number(&data));
    assert!(opened.objects.cut_off(INO).unwrap().contains(16));
    assert!(!opened.objects.unsound(INO, ByteRange::at(EXTENT_BYTES, 1 << 20)).unwrap().is_empty());
}
