//! One session: keeping it alive, hearing its events, opening it again when it has lapsed.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use tokio_stream::StreamExt;
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::control::Control;
use super::volume::{MountOptions, Volume};
use crate::types::{Epoch, Ino, SessionId};
use crate::wire::{id_bytes, session as wire};

/// How long opening may take: no server answering for this long is an error.
const OPEN_DEADLINE: Duration = Duration::from_secs(15);
/// How long a lease may be waited for in one call: longer than a session's default time to live.
const LEASE_DEADLINE: Duration = Duration::from_secs(30);
/// How long a release may take; what cannot be released lapses with the session, or is asked for again.
const RELEASE_DEADLINE: Duration = Duration::from_secs(10);
/// How often a client asks for everything anew, at most: usually what it lacks is on its way already.
const REFRESH_EVERY_MS: u64 = 500;

pub(super) fn client(channel: Channel) -> wire::session_client::SessionClient<Channel> {
    wire::session_client::SessionClient::new(channel)
        .max_decoding_message_size(64 << 20)
        .max_encoding_message_size(64 << 20)
}

/// A session with the metadata log.
pub(super) struct Session {
    control: Arc<Control>,
    options: MountOptions,
    id: AtomicU64,
    ttl_ms: AtomicU64,
    lapsed: AtomicBool,
    wake: tokio::sync::Notify,
    began: Instant,
    /// When the leader was last asked for everything anew, in milliseconds since `began`.
    refreshed_ms: AtomicU64,
    ended: AtomicBool,
    /// The administrator ended it for good.
    evicted: AtomicBool,
}

impl Session {
    /// Opens a session.
    pub(super) async fn open(control: Arc<Control>, options: MountOptions) -> Result<(Self, wire::OpenReply), String> {
        let reply = open(&control, &options, SessionId(0)).await.map_err(|e| e.message().to_owned())?;
        let session = Self {
            control,
            options,
            id: AtomicU64::new(reply.session),
            ttl_ms: AtomicU64::new(u64::from(reply.session_ttl_ms.max(500))),
            lapsed: AtomicBool::new(false),
            wake: tokio::sync::Notify::new(),
            began: Instant::now(),
            refreshed_ms: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            evicted: AtomicBool::new(false),
        };
        Ok((session, reply))
    }

    pub(super) fn control(&self) -> &Control {
        &self.control
    }
    pub(super) fn id(&self) -> SessionId {
        SessionId(self.id.load(Ordering::Acquire))
    }
    pub(super) fn is_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }
    /// The administrator ended it: there will be no other.
    pub(super) fn is_evicted(&self) -> bool {
        self.evicted.load(Ordering::Acquire)
    }

    /// Somebody was told that this session is no more.
    pub(super) fn lapsed(&self, session: SessionId) {
        if session == self.id() && !self.lapsed.swap(true, Ordering::AcqRel) {
            self.wake.notify_one();
        }
    }

    /// A brick knows of something newer than the leader has told: has the leader tell everything anew.
    pub(super) fn refresh(&self) {
        let now = self.began.elapsed().as_millis() as u64;
        let last = self.refreshed_ms.load(Ordering::Acquire);
        let is_due = last + REFRESH_EVERY_MS <= now;
        if is_due && self.refreshed_ms.compare_exchange(last, now, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            self.wake.notify_one();
        }
    }

    pub(super) async fn acquire(&self, session: SessionId, ino: Ino) -> Result<wire::LeaseReply, Status> {
        self.control
            .call(LEASE_DEADLINE, |channel| async move {
                let request = wire::LeaseRequest { session: session.0, ino: ino.0 };
                client(channel).acquire_lease(request).await.map(tonic::Response::into_inner)
            })
            .await
    }

    pub(super) async fn release(&self, session: SessionId, ino: Ino, epoch: Epoch, finished: bool) {
        let released = self
            .control
            .call(RELEASE_DEADLINE, |channel| async move {
                let request = wire::ReleaseRequest { session: session.0, ino: ino.0, epoch: epoch.0, finished };
                client(channel).release_lease(request).await
            })
            .await;
        if let Err(status) = released {
            tracing::warn!(ino = %ino, "cannot give a lease back: {}", status.message());
        }
    }

    /// Ends the session.
    pub(super) async fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.wake.notify_one();
        let session = self.id().0;
        let _ =
            self.control
                .call(Duration::from_secs(3), |channel| async move {
                    client(channel).end(wire::EndRequest { session }).await
                })
                .await;
    }

    /// Keeps the session of `volume` alive until it is ended or dropped.
    pub(super) fn watch(&self, volume: Weak<Volume>) {
        tokio::spawn(async move {
            let weak = volume;
            while let Some(volume) = weak.upgrade() {
                let session = volume.session();
                if session.is_ended() {
                    return;
                }
                if session.lapsed.load(Ordering::Acquire) {
                    session.reopen(&volume).await;
                } else if let Err(status) = session.hear(&volume, weak.clone()).await {
                    if status.code() == Code::NotFound {
                        session.lapsed(session.id());
                    } else {
                        tracing::info!("the leader's events broke off: {}", status.message());
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                }
            }
        });
    }

    async fn reopen(&self, volume: &Volume) {
        match open(&self.control, &self.options, self.id()).await {
            Ok(reply) if reply.evicted => {
                tracing::error!(
                    session = %self.id(),
                    "the administrator has evicted this client: everything fails until the volume is unmounted and mounted again"
                );
                self.evicted.store(true, Ordering::Release);
                self.ended.store(true, Ordering::Release);
                volume.cut_off();
            }
            Ok(reply) => {
                tracing::warn!(old = %self.id(), new = reply.session, "the session had lapsed; a new one was opened");
                self.id.store(reply.session, Ordering::Release);
                self.ttl_ms.store(u64::from(reply.session_ttl_ms.max(500)), Ordering::Release);
                self.lapsed.store(false, Ordering::Release);
                volume.reopened(&reply.sets);
            }
            Err(status) => {
                tracing::warn!("the session had lapsed, and a new one cannot be had: {}", status.message());
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        }
    }

    /// Sends keep-alives and takes events until the stream breaks.
    async fn hear(&self, volume: &Volume, weak: Weak<Volume>) -> Result<(), Status> {
        let session = self.id().0;
        let every = Duration::from_millis((self.ttl_ms.load(Ordering::Acquire) / 6).clamp(100, 1000));
        let mut events = self
            .control
            .call(Duration::from_secs(5), |channel| {
                let busy = weak.clone();
                async move {
                    let beats = tokio_stream::wrappers::IntervalStream::new(tokio::time::interval(every));
                    let in_flight = move || busy.upgrade().map_or(0, |v| v.in_flight() as u32);
                    let beats = beats.map(move |_| wire::KeepAlive { session, in_flight: in_flight() });
                    client(channel).watch(beats).await.map(tonic::Response::into_inner)
                }
            })
            .await?;
        // A leader that says nothing for this long is as good as gone.
        let patience = every * 3 + Duration::from_millis(700);
        loop {
            let next = tokio::select! {
                next = tokio::time::timeout(patience, events.next()) => next,
                () = self.wake.notified() => return Ok(()),
            };
            let Ok(next) = next else { return Err(Status::deadline_exceeded("the leader fell silent")) };
            let Some(event) = next.transpose()? else { return Ok(()) };
            match event.event {
                Some(wire::event::Event::Set(picture)) => {
                    volume.picture(&picture).map_err(|e| Status::internal(e.to_string()))?;
                }
                Some(wire::event::Event::Recall(recall)) => volume.recalled(Ino(recall.ino), Epoch(recall.epoch)),
                Some(wire::event::Event::Lapsed(_)) => {
                    self.lapsed(SessionId(session));
                    return Ok(());
                }
                Some(wire::event::Event::Options(options)) => {
                    self.ttl_ms.store(u64::from(options.session_ttl_ms.max(500)), Ordering::Release);
                    volume.options(&options);
                }
                Some(wire::event::Event::Alive(_)) | None => {}
            }
        }
    }
}

/// Opens a session, in the place of an ended one if `previous` is not 0.
async fn open(control: &Control, options: &MountOptions, previous: SessionId) -> Result<wire::OpenReply, Status> {
    let mut nonce = [0_u8; 16];
    getrandom::fill(&mut nonce).map_err(|e| Status::internal(format!("no random numbers: {e}")))?;
    let nonce = u128::from_be_bytes(nonce);
    let reply = control
        .call(OPEN_DEADLINE, |channel| async move {
            let request = wire::OpenRequest {
                nonce: id_bytes(nonce),
                volume: options.volume.clone(),
                client: options.client.clone(),
                previous: previous.0,
            };
            client(channel).open(request).await.map(tonic::Response::into_inner)
        })
        .await?;
    control.learn(reply.servers.clone());
    Ok(reply)
}
