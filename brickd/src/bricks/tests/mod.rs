//! What bricks promise, over real disks and sockets.

mod data_plane;
mod integrity;
mod repair;
mod world;
