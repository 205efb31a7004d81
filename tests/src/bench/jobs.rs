//! The jobs: what a virtual machine's disk does, one kind of request at a time.

/// One fio job.
#[derive(Clone, Copy, Debug)]
pub struct Job {
    /// Its name in the table.
    pub name: &'static str,
    /// What fio is told beside the file, its size and the time.
    pub arguments: &'static [&'static str],
    /// Which of fio's latencies the table shows.
    pub latency: Latency,
}

/// A latency that fio reports.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Latency {
    /// Of reads, from submission to completion.
    Read,
    /// Of writes, from submission to completion.
    Write,
    /// Of the flush after a write: the write before it is not in it.
    Sync,
}

/// All jobs, in the order in which each round runs them.
pub const JOBS: &[Job] = &[
    Job {
        name: "randwrite-4k-qd1",
        arguments: &["--rw=randwrite", "--bs=4k", "--ioengine=libaio", "--iodepth=1"],
        latency: Latency::Write,
    },
    Job {
        name: "randwrite-4k-qd32",
        arguments: &["--rw=randwrite", "--bs=4k", "--ioengine=libaio", "--iodepth=32"],
        latency: Latency::Write,
    },
    Job {
        name: "randread-4k-qd1",
        arguments: &["--rw=randread", "--bs=4k", "--ioengine=libaio", "--iodepth=1"],
        latency: Latency::Read,
    },
    Job {
        name: "randread-4k-qd32",
        arguments: &["--rw=randread", "--bs=4k", "--ioengine=libaio", "--iodepth=32"],
        latency: Latency::Read,
    },
    Job {
        name: "randrw70-4k-qd32",
        arguments: &["--rw=randrw", "--rwmixread=70", "--bs=4k", "--ioengine=libaio", "--iodepth=32"],
        latency: Latency::Write,
    },
    Job {
        name: "syncwrite-4k-qd1",
        arguments: &["--rw=randwrite", "--bs=4k", "--ioengine=libaio", "--iodepth=1", "--fdatasync=1"],
        latency: Latency::Sync,
    },
    Job {
        name: "threads8-write-4k",
        arguments: &["--rw=randwrite", "--bs=4k", "--ioengine=psync", "--numjobs=8", "--thread", "--group_reporting"],
        latency: Latency::Write,
    },
    Job {
        name: "randwrite-64k-qd16",
        arguments: &["--rw=randwrite", "--bs=64k", "--ioengine=libaio", "--iodepth=16"],
        latency: Latency::Write,
    },
    Job {
        name: "seqwrite-1m-qd8",
        arguments: &["--rw=write", "--bs=1m", "--ioengine=libaio", "--iodepth=8"],
        latency: Latency::Write,
    },
    Job {
        name: "seqread-1m-qd8",
        arguments: &["--rw=read", "--bs=1m", "--ioengine=libaio", "--iodepth=8"],
        latency: Latency::Read,
    },
];
