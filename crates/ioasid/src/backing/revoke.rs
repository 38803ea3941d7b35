//! Taking memory back from everybody; see [the parent module](super).

use super::{Backing, Occupied};
use crate::epoch;
use crate::memory::Piece;
use crate::sync::Ordering;

impl Backing {
    /// Whether it was taken back.
    pub fn is_revoked(&self) -> bool {
        self.revoked.load(Ordering::Acquire)
    }

    /// Takes the object back from everybody, for ever: every mapping of it faults from now on, in every space and every
    /// table, and is unmapped before this returns; nothing of it can be registered or mapped again. When it returns, no
    /// device reaches the memory.
    ///
    /// What is registered stays registered, and charged, until it is dropped. May be called beside any other operation,
    /// from any thread; but neither inside a DMA section, nor from a call of a [`DerivedTable`](crate::DerivedTable) or a
    /// [`LateBound`](crate::LateBound), which it would wait for.
    ///
    /// A file that was revoked is a new object only when nobody has the revoked backing any more.
    ///
    /// ```
    /// use ioasid::{Account, Backing, Bus, Iova, Memory, Permissions, RegisterError, Space};
    ///
    /// let bus = Bus::new();
    /// let account = Account::new("display", None);
    /// let buffer = Backing::anonymous(&bus, 1 << 20)?;
    /// let space = Space::new(&bus);
    /// let memory = Memory::register(&buffer, 0, 1 << 20, &account)?;
    /// space.map(Iova::new(0x10_0000), &memory, 0, 1 << 20, Permissions::READ)?;
    /// buffer.revoke();
    /// assert!(space.walk(Iova::new(0x10_0000)).is_none());
    /// assert!(matches!(Memory::register(&buffer, 0, 4096, &account), Err(RegisterError::Revoked)));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn revoke(&self) {
        // Every DMA to it faults from here on.
        self.revoked.store(true, Ordering::SeqCst);
        // DMA that found a window open may still be copying. A map that found the object there may still be about to
        // become visible; its note of where is there already.
        epoch::wait_for_dma();
        epoch::wait_for_operations();
        let mut registrations = self.registrations();
        let mut pieces: Vec<Piece> =
            registrations.windows.values().map(|window| self.piece(window)).collect();
        pieces.sort_unstable_by_key(|piece| piece.oa);
        let mut notes = Vec::new();
        self.mapped_in.for_each(|note| notes.push(note));
        registrations.earlier.iter().for_each(|note| note.add_to(&mut notes));
        for note in notes {
            note.unmap(&pieces, None);
        }
        // Nothing is mapped any more on behalf of registrations that are gone.
        registrations.earlier.clear();
    }

    /// All of a window of the object.
    fn piece(&self, window: &Occupied) -> Piece {
        Piece { oa: window.oa, length: 1 << self.window_bits() }
    }
}
