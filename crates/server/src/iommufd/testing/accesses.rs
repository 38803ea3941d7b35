//! Accesses: users of an address space inside the kernel, as drivers of mediated devices are.
//!
//! An access reads and writes memory by IOVA, whether or not there is a page table, and may *pin* pages: registered by its own
//! right, they stay although a device that had them goes. Whoever unmaps what is pinned asks the access to let go, and this
//! driver always does, at once. So nothing here makes an unmap fail, though a kernel's other drivers could.
//!
//! The test knows an access by a descriptor: an open file ([`AccessFile`]) whose last close ends it.
//!
//! # Locks
//! Which space an access is on comes before that space's areas; what it has pinned comes behind them, so that pinning and
//! unmapping are one step each. Copies hold neither: an unmap waits for those that may have found what it has unmapped.

use std::sync::{Arc, Mutex};

use ioasid::{IovaRange, Memory};
use ioasid_uapi::iommufd_test as uapi;
use ioasid_uapi::iommufd_test::{AccessPagesFlags, AccessRwFlags, CreateAccessFlags};
use rustix::io::Errno;

use super::super::ioas::{Ioas, Slice};
use super::super::objects::{Counted, Held, Object, Users};
use super::super::{Call, Context};
use crate::limits::Taken;
use crate::memory::PAGE_SIZE;
use crate::poison::lock;
use crate::{Descriptor, File, FileKind};

/// The most that is pinned or copied by one call, in bytes.
const LONGEST_ACCESS: u64 = 16 << 20;

/// How many pins one access may have.
const PINS_PER_ACCESS: usize = 4096;

/// How many bytes are copied at a time.
const PIECE: usize = 64 << 10;

/// A user of an address space: an object of its context.
#[derive(Debug)]
pub(crate) struct Access {
    users: Users,
    pins_pages: bool,
    space: Mutex<Option<Held<Ioas>>>,
    pins: Mutex<Pins>,
}

#[derive(Debug, Default)]
struct Pins {
    next: u32,
    living: Vec<Pin>,
}

/// What one call has pinned.
#[derive(Debug)]
struct Pin {
    id: u32,
    range: IovaRange,
    /// Held until the pin ends.
    pieces: Vec<PinnedPiece>,
    _share: Taken,
}

/// What a pin holds of one area.
#[derive(Debug, Clone)]
pub(crate) struct PinnedPiece {
    /// What the area refers to. Who pays for that pays for the pin.
    pub(crate) source: Slice,
    pub(crate) memory: Arc<Memory>,
}

impl Counted for Access {
    fn users(&self) -> &Users {
        &self.users
    }
}

impl Access {
    /// Whether it may pin pages.
    pub(crate) fn pins_pages(&self) -> bool {
        self.pins_pages
    }

    /// Whether it has pinned anything in `range`.
    pub(crate) fn has_pinned(&self, range: IovaRange) -> bool {
        lock(&self.pins).living.iter().any(|pin| pin.range.intersection(&range).is_some())
    }

    /// Lets go of all that it has pinned in `range`, pin by pin.
    pub(crate) fn let_go(&self, range: IovaRange) {
        lock(&self.pins).living.retain(|pin| pin.range.intersection(&range).is_none());
    }

    /// Enters what was pinned; returns its number. Called with the areas of the space locked.
    ///
    /// # Errors
    /// `ENOMEM`: too many.
    pub(crate) fn enter_pin(
        &self,
        range: IovaRange,
        pieces: Vec<PinnedPiece>,
        share: Taken,
    ) -> Result<u32, Errno> {
        let mut pins = lock(&self.pins);
        if pins.living.len() >= PINS_PER_ACCESS {
            return Err(Errno::NOMEM);
        }
        let id = pins.next;
        pins.next = pins.next.wrapping_add(1);
        pins.living.push(Pin { id, range, pieces, _share: share });
        Ok(id)
    }

    /// All that it has pinned.
    pub(crate) fn pinned(&self) -> Vec<PinnedPiece> {
        lock(&self.pins).living.iter().flat_map(|pin| pin.pieces.iter().cloned()).collect()
    }

    /// Ends a pin.
    ///
    /// # Errors
    /// `ENOENT`: there is none of this number (any more).
    fn unpin(&self, id: u32) -> Result<(), Errno> {
        let mut pins = lock(&self.pins);
        let at = pins.living.iter().position(|pin| pin.id == id).ok_or(Errno::NOENT)?;
        pins.living.swap_remove(at);
        Ok(())
    }

    /// The space that it is on.
    fn space(&self) -> Result<Held<Ioas>, Errno> {
        lock(&self.space).as_ref().and_then(|ioas| Held::new(ioas.arc())).ok_or(Errno::NOENT)
    }

    /// Moves it to another space, or to none.
    fn move_to(self: &Arc<Self>, ioas: Option<Held<Ioas>>) -> Result<(), Errno> {
        let mut space = lock(&self.space);
        let same = match (&*space, &ioas) {
            (Some(old), Some(new)) => Arc::ptr_eq(old.arc(), new.arc()),
            _ => false,
        };
        if same {
            return Ok(());
        }
        if let Some(new) = &ioas {
            new.add_access(self)?;
        }
        if let Some(old) = std::mem::replace(&mut *space, ioas) {
            old.remove_access(self);
        }
        Ok(())
    }
}

/// The open file of an access.
#[derive(Debug)]
pub(crate) struct AccessFile {
    context: Arc<Context>,
    id: u32,
    access: Arc<Access>,
}

impl Drop for AccessFile {
    fn drop(&mut self) {
        // To no space one can always move.
        let moved = self.access.move_to(None);
        debug_assert!(moved.is_ok());
        self.context.objects().remove(self.id, &Object::Access(Arc::clone(&self.access)));
    }
}

impl Call<'_> {
    /// The access behind a descriptor of the client.
    fn access(&self, fd: u32) -> Result<Arc<Access>, Errno> {
        match self.client.descriptor(fd as i32) {
            Ok(Descriptor::Ours(file)) => {
                file.access().map(|file| Arc::clone(&file.access)).ok_or(Errno::BADFD)
            }
            _ => Err(Errno::BADFD),
        }
    }

    pub(super) fn create_access(&self, mut command: uapi::TestCommand) -> Result<(), Errno> {
        let mut create: uapi::CreateAccess = command.payload();
        let flags = CreateAccessFlags::from_bits(create.flags).ok_or(Errno::OPNOTSUPP)?;
        let reservation = self.context.objects.reserve()?;
        let ioas = self.context.objects.hold_ioas(command.id)?;
        let access = Arc::new(Access {
            users: Users::default(),
            pins_pages: flags.contains(CreateAccessFlags::NEEDS_PIN_PAGES),
            space: Mutex::new(None),
            pins: Mutex::default(),
        });
        access.move_to(Some(ioas))?;
        // The file is a user of the object, so that DESTROY cannot take it away.
        access.users.acquire();
        let context = Arc::clone(self.context);
        let file = AccessFile { context, id: reservation.id(), access: Arc::clone(&access) };
        reservation.install(Object::Access(access));
        let file = File::new(self.context.allowance(), || FileKind::Access(file))?;
        let fd = self.client.give_descriptor(file, true)?;
        create.out_access_fd = fd as u32;
        command.set_payload(&create);
        self.respond(&command)
    }

    pub(super) fn replace_access_space(&self, id: u32, asked: uapi::AccessReplaceIoas) -> Result<(), Errno> {
        let access = self.access(id)?;
        let ioas = self.context.objects.hold_ioas(asked.ioas_id)?;
        access.move_to(Some(ioas))
    }

    pub(super) fn pin_pages(&self, mut command: uapi::TestCommand) -> Result<(), Errno> {
        let mut pages: uapi::AccessPages = command.payload();
        if pages.length > LONGEST_ACCESS {
            return Err(Errno::NOMEM);
        }
        let flags = AccessPagesFlags::from_bits(pages.flags).ok_or(Errno::OPNOTSUPP)?;
        let access = self.access(command.id)?;
        if !access.pins_pages || flags.contains(AccessPagesFlags::FUZZER) {
            return Err(Errno::OPNOTSUPP);
        }
        let range = range_of(pages.iova, pages.length)?;
        let (id, pieces) = {
            let space = lock(&access.space);
            let ioas = space.as_ref().ok_or(Errno::NOENT)?;
            ioas.pin(&access, range, flags.contains(AccessPagesFlags::WRITE))?
        };
        pages.out_access_pages_id = id;
        command.set_payload(&pages);
        let result = self.compare_pages(range, &pieces, pages.uptr).and_then(|()| self.respond(&command));
        if result.is_err() {
            // Somebody may have unmapped it meanwhile.
            let _gone = access.unpin(id);
        }
        result
    }

    /// Whether the memory under `range` is made of the caller's pages at `address`; 0 asks for nothing.
    fn compare_pages(&self, range: IovaRange, pieces: &[PinnedPiece], address: u64) -> Result<(), Errno> {
        if address == 0 {
            return Ok(());
        }
        let length = range.length().ok_or(Errno::OVERFLOW)?;
        let expected = self.context.memory.identify(&self.client.process()?, address, length)?;
        let page = |memory: &Memory, offset| memory.output(offset).map(|output| output.get() / PAGE_SIZE);
        let mut begin = 0;
        for PinnedPiece { memory: piece, .. } in pieces {
            let end = begin + piece.length();
            let mut at = begin;
            while at < end {
                if page(piece, at - begin) != page(&expected, at) {
                    return Err(Errno::BADE);
                }
                // The first byte of the next page.
                at = at.saturating_add(PAGE_SIZE - (range.first() + at) % PAGE_SIZE);
            }
            begin = end;
        }
        Ok(())
    }

    pub(super) fn unpin_pages(&self, id: u32, asked: uapi::DestroyAccessPages) -> Result<(), Errno> {
        self.access(id)?.unpin(asked.access_pages_id)
    }

    /// Copies between an access's space and the caller's memory.
    pub(super) fn access_memory(&self, id: u32, asked: uapi::AccessRw) -> Result<(), Errno> {
        if asked.length > LONGEST_ACCESS {
            return Err(Errno::NOMEM);
        }
        // Copying page by page is what happens anyway.
        let flags = AccessRwFlags::from_bits(asked.flags).ok_or(Errno::OPNOTSUPP)?;
        let write = flags.contains(AccessRwFlags::WRITE);
        let access = self.access(id)?;
        let range = range_of(asked.iova, asked.length)?;
        asked.uptr.checked_add(asked.length).ok_or(Errno::FAULT)?;
        let ioas = access.space()?;
        let mut buffer = vec![0; PIECE.min(usize::try_from(asked.length).unwrap_or(PIECE))];
        let mut at = asked.uptr;
        let copies = ioas.begin_copies();
        for piece in ioas.pieces_to_copy(range, write)? {
            let memory = piece.memory()?;
            let mut done = 0;
            while done < piece.length() {
                let part = &mut buffer[..usize::try_from(piece.length() - done).unwrap_or(PIECE).min(PIECE)];
                let offset = memory.offset().wrapping_add(piece.offset()).wrapping_add(done);
                if write {
                    self.client.read(at, part)?;
                    memory.backing().write(offset, part).map_err(|_| Errno::FAULT)?;
                } else {
                    memory.backing().read(offset, part).map_err(|_| Errno::FAULT)?;
                    self.client.write(at, part)?;
                }
                done += part.len() as u64;
                at += part.len() as u64;
            }
        }
        drop(copies);
        Ok(())
    }
}

fn range_of(iova: u64, length: u64) -> Result<IovaRange, Errno> {
    if length == 0 {
        return Err(Errno::INVAL);
    }
    IovaRange::with_length(iova, length).ok_or(Errno::OVERFLOW)
}
