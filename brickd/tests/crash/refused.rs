//! A disk that refuses some writes for a while. The kernel tells once, takes what it could not write for written, and reads it
//! from its own memory as if nothing had happened [W8].

use std::sync::Arc;

use mortar_proto::config::{BrickState, Slot};
use mortar_proto::wire::data::{self, request::What, response::Outcome};

use crate::disk::Disk;
use crate::holder::Holder;
use crate::mounted::{self, Xfs};
use crate::play::{self, object};
use crate::server::{Places, Server, wait_for};

const BLOCKS: usize = 16;
const FIRST: Slot = Slot(0);

#[test]
fn what_the_disk_refused_is_on_it_before_the_brick_is_in_sync_again() {
    if !mounted::inside("refused::what_the_disk_refused_is_on_it_before_the_brick_is_in_sync_again") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::serve(&dir.path().join("refuses")).unwrap();
    mounted::make_xfs(&disk.file()).unwrap();
    let xfs = Xfs::mount(&disk.file(), &dir.path().join("disk")).unwrap();
    let elsewhere = dir.path().join("elsewhere");
    let places = Places {
        server: elsewhere.join("server"),
        bricks: [xfs.at().join("brick"), elsewhere.join("b1"), elsewhere.join("b2")],
    };
    let server = Server::start(&places);
    server.wait_for_states(play::IN_SYNC);
    let session = server.session();
    let ino = server.create(session, "file");
    let content = b"what the disk refuses; ".repeat(4096)[..BLOCKS * 4096].to_vec();
    let mut holder = Holder::new(&server, ino, session);
    let write = |holder: &mut Holder, data: &[u8]| {
        let sums = Default::default();
        holder.mutate(&What::Write(data::Write { offset: 0, sums }), data);
    };
    write(&mut holder, &vec![1; BLOCKS * 4096]);
    holder.flush();
    holder.settle();

    disk.refuse(Some(content[..64].to_vec()));
    write(&mut holder, &content);
    let flush = What::Flush(data::Flush {});
    let answers = Slot::ALL.map(|slot| holder.ask(slot, 0, &flush, &[]));
    assert!(matches!(&answers, [Outcome::Failed(f), Outcome::Done(_), Outcome::Done(_)] if f.brick), "{answers:?}");
    disk.refuse(None);
    wait_for("the brick to be out", || (server.configuration().state(FIRST) == BrickState::Out).then_some(()));
    let before = server.configuration().members[0].boot;
    server.kill();
    let data = object(&places.bricks[0], ino)[0].clone();
    assert!(std::fs::read(&data).unwrap() == content, "the kernel has it, as this test supposes");
    assert!(!disk.contains(&content[..64]), "the disk lacks it, as this test supposes");

    let server = Server::start(&places);
    server.end_sessions();
    let session = server.session();
    play::heal(&server, session);
    server.wait_for_states(play::IN_SYNC);
    let left = disk.record();
    assert_ne!(
        server.configuration().members[0].boot,
        before,
        "[E7] it counts as a brick that lost what was not flushed"
    );
    server.kill();
    xfs.unmount().unwrap();
    drop(disk);
    let image = Disk::serve(&dir.path().join("image")).unwrap();
    image.become_image(Arc::new(left), std::iter::empty());
    let xfs = Xfs::mount(&image.file(), &dir.path().join("left")).unwrap();
    let data = object(&xfs.at().join("brick"), ino)[0].clone();
    assert!(std::fs::read(&data).unwrap() == content, "a brick that is in sync lacks what was flushed");
    xfs.unmount().unwrap();
}
