//! What is said in one breath, because each answer that is waited for takes a round trip: the disk and what was written
//! there, of which must be told how it is after the disk was given; and all of the handshake with an export of ours.

use std::cell::Cell;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use blkferry::engine::ByteRange;
use blkferry::nbd::{
    Address, Ask, Base, ExportInfo, HANDOFF_VERSION, NbdError, ServerHandshake, ServerStep, Standing, Told,
    TransmissionFlags,
};
use blkferry::remote::{Beforehand, Changed, LossPolicy, OnLoss, Source};
use blkferry::server::{Disk, DiskExtent, ServeStats, Server};
use blkferry::uring::{Listener, Part, Reactor, sleep};
use uuid::Uuid;

const SIZE: u64 = 1 << 20;
/// How long the source takes to freeze.
const FREEZE: Duration = Duration::from_millis(50);

/// A disk that its guest writes until it is given away.
struct Written {
    /// Whoever asks what was written while it is being given away waits for that.
    in_turn: bool,
    giving: async_lock::Mutex<()>,
    written: Cell<bool>,
}

fn base() -> Base {
    Base { disk: Uuid::from_u128(1), epoch: 2 }
}

impl Disk for Written {
    fn export(&self) -> ExportInfo {
        let disk = Uuid::from_u128(2);
        let base = Some(base());
        let standing = Standing { version: HANDOFF_VERSION, disk, epoch: 2, given_to: None, base, complete: true };
        let flags = TransmissionFlags::HAS_FLAGS | TransmissionFlags::READ_ONLY;
        ExportInfo {
            identity: Some("device:2".into()),
            standing: Some(standing),
            ..ExportInfo::new("disk", SIZE, flags)
        }
    }

    async fn hand_off(&self, _: Ask) -> Result<Told, NbdError> {
        let _turn = self.giving.lock().await;
        sleep(FREEZE).await;
        self.written.set(true);
        Ok(Told::Given { epoch: 3, identity: "device:3".into() })
    }

    async fn changed(&self, range: ByteRange, _: usize) -> Result<Vec<(u64, bool)>, NbdError> {
        let turn = if self.in_turn { Some(self.giving.lock().await) } else { None };
        let told = vec![(range.len(), self.written.get())];
        drop(turn);
        Ok(told)
    }

    async fn read(&self, range: ByteRange) -> Result<Vec<Part>, NbdError> {
        Ok(vec![Part::Zeros(range.len() as usize)])
    }

    async fn prefetch(&self, _: ByteRange) -> Result<(), NbdError> {
        Ok(())
    }

    async fn extents(&self, _: ByteRange, _: usize) -> Result<Vec<DiskExtent>, NbdError> {
        Err(NbdError::NotSup)
    }
}

/// What is told with the disk, and what is told to whoever asks after that.
fn take_from(socket: &Path, in_turn: bool) -> (Option<Changed>, Changed) {
    let listener = Listener::unix(socket).unwrap();
    let disk = Rc::new(Written { in_turn, giving: async_lock::Mutex::new(()), written: Cell::new(false) });
    let uri = Address::Unix(socket.into()).uri("");
    let take = async move {
        let _server = Server::start(listener, disk, ServeStats::default());
        let source = Source::open(uri, LossPolicy::new(OnLoss::Wait), Beforehand::default()).await.unwrap();
        let ask = Ask::Take { disk: Uuid::from_u128(2), to: Uuid::from_u128(3), epoch: 3, wait_ms: 0 };
        let (told, changed) = source.hand_off_and_tell(&ask).await.unwrap();
        assert!(matches!(told, Told::Given { epoch: 3, .. }), "{told:?}");
        (changed, source.changed().await.unwrap())
    };
    Reactor::new().unwrap().block_on(take).unwrap()
}

#[test]
fn what_is_told_with_the_disk_is_how_it_is_after_it_was_given() {
    let dir = tempfile::tempdir().unwrap();
    let (with_it, after_it) = take_from(&dir.path().join("s"), true);
    let with_it = with_it.expect("it was told in the same round trip");
    assert_eq!((with_it.base, with_it.stretches), (Some(base()), vec![(SIZE, true)]));
    assert_eq!(after_it.stretches, [(SIZE, true)]);
}

/// Of a source that answers at once, as earlier versions do: the guest has written since.
#[test]
fn what_was_told_before_the_disk_was_given_is_not_believed() {
    let dir = tempfile::tempdir().unwrap();
    let (with_it, after_it) = take_from(&dir.path().join("s"), false);
    assert!(with_it.is_none(), "{with_it:?}");
    assert_eq!(after_it.stretches, [(SIZE, true)]);
}

/// Answers no option before it has got all of them, and says when it has.
fn patient_server(listener: &UnixListener) {
    let (mut stream, _) = listener.accept().unwrap();
    let export = ExportInfo {
        identity: Some("device:2".into()),
        ..ExportInfo::new("disk", SIZE, TransmissionFlags::HAS_FLAGS | TransmissionFlags::READ_ONLY)
    };
    let (mut server, greeting) = ServerHandshake::new(vec![export]);
    stream.write_all(&greeting).unwrap();
    let mut kept = Vec::new();
    loop {
        let mut bytes = vec![0; server.needs()];
        stream.read_exact(&mut bytes).unwrap();
        match server.feed(&bytes).unwrap() {
            ServerStep::Reply(reply) => kept.extend(reply),
            ServerStep::Transmission { reply, .. } => {
                kept.extend(reply);
                stream.write_all(&kept).unwrap();
                // Until the client leaves.
                let _ = stream.read_to_end(&mut Vec::new());
                return;
            }
            ServerStep::Close { .. } => panic!("the client knows how to shake hands"),
        }
    }
}

#[test]
fn all_options_go_at_once_to_whom_they_may() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let listener = UnixListener::bind(&socket).unwrap();
    let uri = Address::Unix(socket).uri("");
    std::thread::scope(|scope| {
        scope.spawn(|| patient_server(&listener));
        let open = async move {
            let beforehand = Beforehand { keeps_up: false, known_ferry: true };
            let source = Source::open(uri, LossPolicy::new(OnLoss::Wait), beforehand).await.unwrap();
            let told = (source.size_bytes(), source.identity());
            source.hang_up();
            told
        };
        assert_eq!(Reactor::new().unwrap().block_on(open).unwrap(), (SIZE, "device:2".into()));
    });
}
