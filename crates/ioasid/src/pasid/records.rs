//! What is known of each allocated ID: a table indexed by it.
//!
//! IDs are allocated lowest first, so the ones in use are close together, and a table of pieces that come with the first ID in
//! them wastes little. An entry has 40 bytes. The IDs of a set are linked through the table, both ways: a set that is given up
//! finds its own IDs without a look at the others', and an ID leaves in one step.

/// What an ID is to its set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    Free,
    Allocated,
    /// Freed, but somebody holds it still.
    Pending,
}

/// No neighbour in the list, no private ID.
pub(super) const NONE: u32 = u32::MAX;

/// An ID.
#[derive(Clone, Copy, Debug)]
pub(super) struct Record {
    pub(super) data: u64,
    pub(super) set: u32,
    /// The set's private ID for it, or [`NONE`].
    pub(super) spid: u32,
    /// How often it is held; bindings count too.
    pub(super) references: u32,
    pub(super) bindings: u32,
    /// Neighbours in the list of the set.
    pub(super) previous: u32,
    pub(super) next: u32,
    pub(super) life: Life,
}

const FREE: Record = Record {
    data: 0,
    set: NONE,
    spid: NONE,
    references: 0,
    bindings: 0,
    previous: NONE,
    next: NONE,
    life: Life::Free,
};

const PIECE: usize = 256;

/// The allocated IDs. Pieces stay: they are bounded by the capacity.
#[derive(Debug)]
pub(super) struct Records {
    pieces: Vec<Option<Box<[Record; PIECE]>>>,
}

impl Records {
    pub(super) fn new(capacity: u32) -> Records {
        Records { pieces: vec![None; (capacity as usize).div_ceil(PIECE)] }
    }

    /// What is known of an ID that is not free.
    pub(super) fn get(&self, id: u32) -> Option<&Record> {
        let piece = self.pieces.get(id as usize / PIECE)?.as_ref()?;
        Some(&piece[id as usize % PIECE]).filter(|record| record.life != Life::Free)
    }

    pub(super) fn get_mut(&mut self, id: u32) -> Option<&mut Record> {
        let piece = self.pieces.get_mut(id as usize / PIECE)?.as_mut()?;
        Some(&mut piece[id as usize % PIECE]).filter(|record| record.life != Life::Free)
    }

    /// Enters a free ID as allocated for `set`, before `first` in its list.
    pub(super) fn enter(&mut self, id: u32, set: u32, first: u32, data: u64) {
        if let Some(first) = self.get_mut(first) {
            first.previous = id;
        }
        let piece = self.pieces[id as usize / PIECE].get_or_insert_with(|| Box::new([FREE; PIECE]));
        piece[id as usize % PIECE] = Record { data, set, next: first, life: Life::Allocated, ..FREE };
    }

    /// Removes an ID, and returns what is now the first of a list that had `first` first.
    pub(super) fn remove(&mut self, id: u32, first: u32) -> u32 {
        let Some(record) = self.get_mut(id) else { return first };
        let Record { previous, next, .. } = std::mem::replace(record, FREE);
        if let Some(next) = self.get_mut(next) {
            next.previous = previous;
        }
        match self.get_mut(previous) {
            Some(previous) => {
                previous.next = next;
                first
            }
            None => next,
        }
    }

    /// How many bytes it has.
    pub(super) fn bytes(&self) -> u64 {
        let pieces = self.pieces.iter().flatten().count() * size_of::<[Record; PIECE]>();
        (pieces + size_of_val::<[Option<Box<[Record; PIECE]>>]>(&self.pieces)) as u64
    }
}
