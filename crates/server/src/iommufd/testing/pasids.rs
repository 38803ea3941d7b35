//! PASIDs of mock devices: the rules are those of every device, and there is a look at where one leads.

use ioasid_uapi::iommufd_test as uapi;
use rustix::io::Errno;

use super::super::Call;
use super::super::device::PasidAttach;

impl Call<'_> {
    pub(super) fn attach_mock_pasid(&self, mut command: uapi::TestCommand) -> Result<(), Errno> {
        let uapi::PasidAttach { pasid, pt_id } = command.payload();
        let test_device = self.context.objects.hold_test_device(command.id)?;
        let pt_id = test_device.device().attach_pasid(self.context, pasid, pt_id, PasidAttach::Attach)?;
        command.set_payload(&uapi::PasidAttach { pasid, pt_id });
        let told = self.respond(&command);
        if told.is_err() {
            test_device.device().detach_pasid(pasid);
        }
        told
    }

    pub(super) fn replace_mock_pasid(&self, mut command: uapi::TestCommand) -> Result<(), Errno> {
        let uapi::PasidReplace { pasid, pt_id } = command.payload();
        let test_device = self.context.objects.hold_test_device(command.id)?;
        let pt_id = test_device.device().attach_pasid(self.context, pasid, pt_id, PasidAttach::Replace)?;
        command.set_payload(&uapi::PasidReplace { pasid, pt_id });
        self.respond(&command)
    }

    pub(super) fn detach_mock_pasid(&self, id: u32, asked: uapi::PasidDetach) -> Result<(), Errno> {
        self.context.objects.hold_test_device(id)?.device().detach_pasid(asked.pasid);
        Ok(())
    }

    /// Compares where a PASID leads with a page table; 0: nowhere.
    pub(super) fn check_mock_pasid(&self, id: u32, asked: uapi::PasidCheckHwpt) -> Result<(), Errno> {
        let test_device = self.context.objects.hold_test_device(id)?;
        let expected = match asked.hwpt_id {
            0 => None,
            hwpt => Some(self.context.objects.hold_hwpt(hwpt)?.id()),
        };
        if test_device.device().table_of(asked.pasid) == expected { Ok(()) } else { Err(Errno::INVAL) }
    }
}
