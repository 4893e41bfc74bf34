package seccomp

import "golang.org/x/sys/unix"

// inotify are the calls that make an instance.
var inotify = []uint32{unix.SYS_INOTIFY_INIT, unix.SYS_INOTIFY_INIT1}

// archForbidden are calls that only some machines have.
var archForbidden = []uint32{
	unix.SYS_IOPERM, unix.SYS_IOPL, unix.SYS_USELIB,
	unix.SYS_CREATE_MODULE, unix.SYS_QUERY_MODULE, unix.SYS_GET_KERNEL_SYMS,
	unix.SYS__SYSCTL, unix.SYS_USTAT, unix.SYS_SYSFS,
}
