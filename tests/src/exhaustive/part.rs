//! A part of a world that worlds share until one of them changes it, with what it looks like.

use std::cell::OnceCell;
use std::fmt::Debug;
use std::ops::{Deref, DerefMut};
use std::rc::Rc;

use super::canonical::Picture;

/// What a part shows of itself for [`super::canonical`].
pub trait Shown {
    /// Everything that makes a difference.
    fn shown(&self) -> impl Debug + '_;
}

#[derive(Debug)]
struct Inner<T> {
    value: T,
    picture: OnceCell<Picture>,
}

impl<T: Clone> Clone for Inner<T> {
    /// Whoever clones it is about to change it.
    fn clone(&self) -> Self {
        Self { value: self.value.clone(), picture: OnceCell::new() }
    }
}

/// A shared part.
#[derive(Clone, Debug)]
pub struct Part<T>(Rc<Inner<T>>);

impl<T> Part<T> {
    /// A new one.
    pub fn new(value: T) -> Self {
        Self(Rc::new(Inner { value, picture: OnceCell::new() }))
    }
}

impl<T: Shown> Part<T> {
    /// What it looks like.
    pub fn picture(&self) -> &Picture {
        self.0.picture.get_or_init(|| Picture::new(&self.0.value.shown()))
    }
}

impl<T> Deref for Part<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0.value
    }
}

impl<T: Clone> DerefMut for Part<T> {
    fn deref_mut(&mut self) -> &mut T {
        let inner = Rc::make_mut(&mut self.0);
        inner.picture.take();
        &mut inner.value
    }
}
