//! Guest memory as vm-memory keeps it.
