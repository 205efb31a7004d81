//! Bytes: read, write, truncate, fallocate, seek, O_DIRECT, O_APPEND, O_SYNC, mmap.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::fs::{FallocateFlags, SeekFrom, copy_file_range, fallocate, seek};
use rustix::io::Errno;

use super::{Memory, OneMount, all, bytes, filled, in_parallel, open, refused};

/// All of this file.
pub const ALL: &[OneMount] = &[
    ("any-offset-and-length", any_offset_and_length),
    ("reading-at-the-end", reading_at_the_end),
    ("sparse-4-tib", sparse_4_tib),
    ("truncate", truncate),
    ("truncate-at-open", truncate_at_open),
    ("append", append),
    ("append-in-parallel", append_in_parallel),
    ("o-direct-takes-whole-sectors", o_direct_takes_whole_sectors),
    ("o-direct-and-buffered-agree", o_direct_and_buffered_agree),
    ("memory-alignment-never-matters", memory_alignment_never_matters),
    ("parallel-writes", parallel_writes),
    ("synchronous-writes", synchronous_writes),
    ("allocate", allocate),
    ("punch", punch),
    ("zero", zero),
    ("seek-data-and-hole", seek_data_and_hole),
    ("mapped-memory", mapped_memory),
    ("copy-range", copy_range),
    ("read-only-handles", read_only_handles),
];

const MIB: usize = 1 << 20;

fn any_offset_and_length(dir: &Path) -> Result<()> {
    let file = open(&dir.join("f"), 0)?;
    let mut expected = vec![0u8; 3 * MIB];
    file.set_len(expected.len() as u64)?;
    let places =
        [(0, 1), (1, 1), (4095, 2), (4096, 4096), (511, 513), (MIB - 3, 7), (100, 2 * MIB + 1), (3 * MIB - 1, 1)];
    for (n, (offset, length)) in places.into_iter().enumerate() {
        let data: Vec<u8> = (0..length).map(|i| (i * 7 + n * 31 + 1) as u8).collect();
        file.write_all_at(&data, offset as u64)?;
        expected[offset..offset + length].copy_from_slice(&data);
        let (from, to) = (offset.saturating_sub(9), (offset + length + 9).min(expected.len()));
        ensure!(bytes(&file, from as u64, to - from)? == expected[from..to], "around {offset}+{length}");
    }
    ensure!(bytes(&file, 0, expected.len())? == expected, "the whole file");
    Ok(())
}

fn reading_at_the_end(dir: &Path) -> Result<()> {
    let file = filled(&dir.join("f"), 5, 1000)?;
    let mut buffer = [0u8; 4096];
    ensure!(file.read_at(&mut buffer, 0)? == 1000, "a read is short at the end");
    ensure!(file.read_at(&mut buffer, 999)? == 1, "the last byte");
    ensure!(file.read_at(&mut buffer, 1000)? == 0 && file.read_at(&mut buffer, 1 << 40)? == 0, "beyond the end");
    Ok(())
}

fn sparse_4_tib(dir: &Path) -> Result<()> {
    let end = 4u64 << 40;
    let file = open(&dir.join("f"), 0)?;
    file.set_len(end)?;
    file.write_all_at(&[b'e'; 512], end - 512)?;
    ensure!(all(&bytes(&file, end - 512, 512)?, b'e') && all(&bytes(&file, end / 2, 512)?, 0), "content");
    let seen = file.metadata()?;
    ensure!(seen.len() == end && seen.blocks() < 2048, "size {}, blocks {}", seen.len(), seen.blocks());
    Ok(())
}

fn truncate(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    let file = filled(&path, 0x22, MIB)?;
    file.set_len(4196)?;
    ensure!(fs::metadata(&path)?.len() == 4196, "the size by its name");
    file.set_len(MIB as u64)?;
    ensure!(all(&bytes(&file, 0, 4196)?, 0x22), "data before the cut");
    ensure!(all(&bytes(&file, 4196, MIB - 4196)?, 0), "old data is visible again after the cut");
    rustix::fs::ftruncate(OpenOptions::new().write(true).open(&path)?, 7)?;
    ensure!(fs::read(&path)? == [0x22; 7], "another handle's cut");
    file.set_len(0)?;
    ensure!(file.metadata()?.blocks() == 0 && fs::read(&path)?.is_empty(), "nothing is left");
    Ok(())
}

fn truncate_at_open(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    let old = filled(&path, 1, 10_000)?;
    let new = OpenOptions::new().write(true).truncate(true).open(&path)?;
    ensure!(old.metadata()?.len() == 0, "O_TRUNC empties the file for all");
    new.write_all_at(b"new", 0)?;
    ensure!(fs::read(&path)? == b"new", "what was written after");
    Ok(())
}

fn append(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    let mut log = OpenOptions::new().append(true).create(true).open(&path)?;
    log.write_all(b"one ")?;
    // Another handle moves the end.
    open(&path, 0)?.write_all_at(b"two ", 4)?;
    log.write_all(b"three")?;
    ensure!(fs::read(&path)? == b"one two three", "{:?}", String::from_utf8_lossy(&fs::read(&path)?));
    ensure!(rustix::fs::tell(&log)? == 13, "the position after an append: {}", rustix::fs::tell(&log)?);
    Ok(())
}

fn append_in_parallel(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    File::create(&path)?;
    in_parallel(8, |n| {
        let mut file = OpenOptions::new().append(true).open(&path)?;
        (0..20).try_for_each(|_| file.write_all(&[b'a' + n; 100])).context("an append")
    })?;
    let data = fs::read(&path)?;
    ensure!(data.len() == 8 * 20 * 100, "{} bytes of 16000: appends overwrote each other", data.len());
    ensure!(data.chunks(100).all(|c| all(c, c[0])), "appends are mixed");
    Ok(())
}

fn o_direct_takes_whole_sectors(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    filled(&path, 0x31, 64 << 10)?;
    let file = open(&path, libc::O_DIRECT)?;
    for (offset, length) in [(0, 1), (0, 511), (1, 512), (256, 512), (512, 700), (100, 100)] {
        let mut memory = Memory::new(length, 0, 0x32);
        refused(file.read_at(memory.get_mut(), offset), Errno::INVAL, &format!("reading {length} at {offset}"))?;
        refused(file.write_at(memory.get(), offset), Errno::INVAL, &format!("writing {length} at {offset}"))?;
    }
    for length in [4096, 64 << 10, MIB] {
        let memory = Memory::new(length, 0, 0x5c);
        let mut back = Memory::new(length, 0, 0);
        ensure!(file.write_at(memory.get(), MIB as u64)? == length, "a short write of {length}");
        ensure!(file.read_at(back.get_mut(), MIB as u64)? == length && all(back.get(), 0x5c), "reading {length}");
    }
    ensure!(file.read_at(Memory::new(4096, 0, 0).get_mut(), 1 << 30)? == 0, "beyond the end");
    file.set_len(3 * MIB as u64 + 100)?;
    let mut tail = Memory::new(4096, 0, 9);
    ensure!(file.read_at(tail.get_mut(), 3 * MIB as u64)? == 100 && all(&tail.get()[..100], 0), "an odd end is short");
    Ok(())
}

fn o_direct_and_buffered_agree(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    let buffered = filled(&path, 0x41, MIB)?;
    bytes(&buffered, 0, MIB)?;
    let direct = open(&path, libc::O_DIRECT)?;
    direct.write_all_at(Memory::new(65536, 0, 0x42).get(), 65536)?;
    ensure!(all(&bytes(&buffered, 65536, 65536)?, 0x42), "a buffered read shows old data");
    buffered.write_all_at(&[0x43; 4096], 131_072)?;
    let mut memory = Memory::new(4096, 0, 0);
    direct.read_exact_at(memory.get_mut(), 131_072)?;
    ensure!(all(memory.get(), 0x43), "a direct read misses a buffered write");
    Ok(())
}

fn memory_alignment_never_matters(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    let file = open(&path, libc::O_DIRECT)?;
    for shift in [512, 4, 1, 4095] {
        let mut memory = Memory::new(4096, shift, 0x51);
        if file.write_at(memory.get(), 0).is_err_and(|e| e.raw_os_error() == Some(libc::EINVAL)) {
            // A local disk may ask for it; then it does so at any length.
            continue;
        }
        for length in [4096, MIB, 3 * MIB + 512] {
            let data = Memory::new(length, shift, shift as u8 ^ 0x5a);
            memory = Memory::new(length, shift, 0);
            let what = || format!("{length} bytes from memory {shift} bytes into a page");
            file.write_all_at(data.get(), 512).with_context(what)?;
            file.read_exact_at(memory.get_mut(), 512).with_context(what)?;
            ensure!(memory.get() == data.get(), "{} come back changed", what());
        }
    }
    Ok(())
}

fn parallel_writes(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    let file = open(&path, libc::O_DIRECT)?;
    let part = 64 << 10;
    in_parallel(16, |n| {
        let memory = Memory::new(part, 0, n);
        // Beyond the end too: the file grows while others write.
        (0..8u64).try_for_each(|round| {
            file.write_all_at(memory.get(), (round * 16 + u64::from(n)) * part as u64).context("a write")
        })
    })?;
    ensure!(file.metadata()?.len() == 128 * part as u64, "size {}", file.metadata()?.len());
    let data = fs::read(&path)?;
    ensure!(data.chunks(part).enumerate().all(|(i, c)| all(c, (i % 16) as u8)), "a part is not what its thread wrote");
    Ok(())
}

fn synchronous_writes(dir: &Path) -> Result<()> {
    for (name, flags) in [("dsync", libc::O_DSYNC), ("sync", libc::O_SYNC), ("direct", libc::O_DSYNC | libc::O_DIRECT)]
    {
        let file = open(&dir.join(name), flags)?;
        file.write_all_at(Memory::new(4096, 0, 6).get(), 0).with_context(|| format!("O_{name}"))?;
        ensure!(all(&fs::read(dir.join(name))?, 6), "O_{name}");
        file.sync_data()?;
        file.sync_all()?;
    }
    Ok(())
}

fn allocate(dir: &Path) -> Result<()> {
    let file = filled(&dir.join("f"), 0xaa, MIB)?;
    fallocate(&file, FallocateFlags::empty(), 0, 4 * MIB as u64)?;
    let seen = file.metadata()?;
    ensure!(seen.len() == 4 * MIB as u64 && seen.blocks() >= 8192, "size {}, blocks {}", seen.len(), seen.blocks());
    ensure!(all(&bytes(&file, 0, MIB)?, 0xaa) && all(&bytes(&file, MIB as u64, 3 * MIB)?, 0), "content");
    fallocate(&file, FallocateFlags::KEEP_SIZE, 4 * MIB as u64, MIB as u64)?;
    ensure!(file.metadata()?.len() == 4 * MIB as u64, "KEEP_SIZE keeps the size");
    let read_only = File::open(dir.join("f"))?;
    refused(fallocate(&read_only, FallocateFlags::empty(), 0, 1), Errno::BADF, "on a handle that only reads")?;
    refused(fallocate(&file, FallocateFlags::PUNCH_HOLE, 0, 4096), Errno::OPNOTSUPP, "PUNCH_HOLE without KEEP_SIZE")
}

fn punch(dir: &Path) -> Result<()> {
    for flags in [0, libc::O_DIRECT] {
        let path = dir.join(format!("f{flags}"));
        filled(&path, 0xaa, 8 * MIB)?.sync_all()?;
        let file = open(&path, flags)?;
        let before = file.metadata()?.blocks();
        fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, MIB as u64 + 100, 2 * MIB as u64)?;
        let data = fs::read(&path)?;
        let (from, to) = (MIB + 100, 3 * MIB + 100);
        ensure!(data.len() == 8 * MIB && all(&data[from..to], 0), "the hole reads zeroes");
        ensure!(all(&data[..from], 0xaa) && all(&data[to..], 0xaa), "data around the hole");
        let after = file.metadata()?.blocks();
        ensure!(after + 3072 <= before, "blocks {before} before and {after} after: no space was freed");
    }
    Ok(())
}

fn zero(dir: &Path) -> Result<()> {
    for (name, keep) in [("grows", false), ("keeps", true)] {
        let path = dir.join(name);
        let file = filled(&path, 0xaa, 4 * MIB)?;
        let flags =
            if keep { FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE } else { FallocateFlags::ZERO_RANGE };
        fallocate(&file, flags, MIB as u64 + 1, MIB as u64)?;
        let data = fs::read(&path)?;
        let (from, to) = (MIB + 1, 2 * MIB + 1);
        ensure!(all(&data[from..to], 0), "{name}: success, and not all is zero");
        ensure!(all(&data[..from], 0xaa) && all(&data[to..], 0xaa), "{name}: data around the range");
        fallocate(&file, flags, 3 * MIB as u64, 2 * MIB as u64)?;
        let size = if keep { 4 * MIB } else { 5 * MIB };
        let data = fs::read(&path)?;
        ensure!(data.len() == size && all(&data[3 * MIB..], 0), "{name}: beyond the end, size {}", data.len());
    }
    Ok(())
}

fn seek_data_and_hole(dir: &Path) -> Result<()> {
    let file = open(&dir.join("f"), 0)?;
    file.set_len(16 * MIB as u64)?;
    file.write_all_at(&vec![1; MIB], 4 * MIB as u64)?;
    file.sync_all()?;
    let (data, hole) = (|at| seek(&file, SeekFrom::Data(at)), |at| seek(&file, SeekFrom::Hole(at)));
    ensure!(hole(0)? == 0 && data(0)? == 4 * MIB as u64, "the first data is at {}", data(0)?);
    let end = hole(4 * MIB as u64)?;
    ensure!((5 * MIB as u64..16 * MIB as u64).contains(&end), "the hole after the data is at {end}");
    refused(data(6 * MIB as u64), Errno::NXIO, "SEEK_DATA where only a hole follows")?;
    refused(data(16 * MIB as u64), Errno::NXIO, "SEEK_DATA at the end")?;
    refused(hole(17 * MIB as u64), Errno::NXIO, "SEEK_HOLE beyond the end")?;
    file.write_all_at(&[1], 16 * MIB as u64 - 1)?;
    ensure!(hole(16 * MIB as u64 - 1)? == 16 * MIB as u64, "the end is a hole");
    ensure!(seek(&file, SeekFrom::End(0))? == 16 * MIB as u64, "SEEK_END");
    Ok(())
}

fn mapped_memory(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    let file = filled(&path, 0x61, 64 << 10)?;
    let length = 64 << 10;
    // SAFETY: a new mapping of a file that stays as long as the mapping.
    let at = unsafe {
        let (protection, fd) = (libc::PROT_READ | libc::PROT_WRITE, std::os::fd::AsRawFd::as_raw_fd(&file));
        libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_SHARED, fd, 0)
    };
    ensure!(at != libc::MAP_FAILED, "a shared mapping: {}", std::io::Error::last_os_error());
    // SAFETY: the mapping has `length` bytes, may be written, and nothing else refers to it.
    let memory = unsafe { std::slice::from_raw_parts_mut(at.cast::<u8>(), length) };
    let read = all(memory, 0x61);
    memory[5000..5010].fill(0x62);
    // SAFETY: the mapping made above; `memory` is not used after it is unmapped.
    let synced = unsafe { libc::msync(at, length, libc::MS_SYNC) | libc::munmap(at, length) };
    ensure!(read && synced == 0, "reading and writing through the mapping");
    let direct = fs::read(&path)?;
    ensure!(all(&direct[5000..5010], 0x62) && direct[4999] == 0x61, "what was written through the mapping");
    Ok(())
}

fn copy_range(dir: &Path) -> Result<()> {
    let from = filled(&dir.join("from"), 0x71, MIB)?;
    let to = open(&dir.join("to"), 0)?;
    let (mut read_at, mut write_at) = (100, 7);
    let mut left = MIB - 200;
    while left > 0 {
        let copied = copy_file_range(&from, Some(&mut read_at), &to, Some(&mut write_at), left)?;
        ensure!(copied > 0, "nothing is copied");
        left -= copied;
    }
    ensure!(to.metadata()?.len() == 7 + MIB as u64 - 200 && all(&bytes(&to, 7, MIB - 200)?, 0x71), "the copy");
    Ok(())
}

fn read_only_handles(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    filled(&path, 1, 10)?;
    let reader = File::open(&path)?;
    refused(reader.write_at(b"x", 0), Errno::BADF, "writing a handle that only reads")?;
    refused(reader.set_len(0), Errno::INVAL, "truncating a handle that only reads")?;
    reader.sync_all().context("fsync of a handle that only reads")?;
    let writer = OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW).open(&path)?;
    refused(writer.read_at(&mut [0], 0), Errno::BADF, "reading a handle that only writes")
}
