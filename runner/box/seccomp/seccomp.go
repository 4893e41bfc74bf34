// Package seccomp is the filter that keeps the code of jobs away from parts of the
// kernel no job needs: mounts, namespaces, io_uring, odd sockets, the machine itself.
//
// It forbids what is known to be dangerous and allows the rest, so it stands beside an
// engine's own list and does not replace one. What the kernel has only so many of for the
// whole machine no job can have either.
package seccomp

import (
	"encoding/binary"
	"fmt"
	"runtime"
	"slices"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// What a filter sees: struct seccomp_data of seccomp(2). Arguments are 64 bit; the
// kernel takes the ones we check as 32, and so must we: the upper half is the
// attacker's to fill (CVE-2019-10063).
const (
	offNr   = 0
	offArch = 4
	offArgs = 16
)

// Calls that fail with EPERM: each gives a way to the kernel that no job needs.
var forbidden = []uint32{
	// Mounts and namespaces.
	unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_PIVOT_ROOT, unix.SYS_CHROOT,
	unix.SYS_UNSHARE, unix.SYS_SETNS,
	unix.SYS_NAME_TO_HANDLE_AT, unix.SYS_OPEN_BY_HANDLE_AT,
	// Kernel facilities with a long list of holes.
	unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN, unix.SYS_USERFAULTFD,
	unix.SYS_KEYCTL, unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY,
	unix.SYS_FANOTIFY_INIT, unix.SYS_LOOKUP_DCOOKIE, unix.SYS_KCMP,
	unix.SYS_VHANGUP, unix.SYS_NFSSERVCTL, unix.SYS_SYSLOG,
	// The machine itself.
	unix.SYS_KEXEC_LOAD, unix.SYS_KEXEC_FILE_LOAD, unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE,
	unix.SYS_SWAPON, unix.SYS_SWAPOFF, unix.SYS_REBOOT, unix.SYS_ACCT,
	unix.SYS_QUOTACTL, unix.SYS_QUOTACTL_FD, unix.SYS_SETHOSTNAME, unix.SYS_SETDOMAINNAME,
	unix.SYS_SETTIMEOFDAY, unix.SYS_CLOCK_SETTIME, unix.SYS_CLOCK_ADJTIME, unix.SYS_ADJTIMEX,
}

// Calls that fail with ENOSYS, as on an older kernel, because libraries then fall
// back: clone3 hides its flags from a filter, so libc must use clone; libuv and
// others use epoll without io_uring. The contexts of io_setup are counted for the whole
// machine (fs.aio-max-nr): one job could leave its databases without any.
var absent = []uint32{
	unix.SYS_CLONE3,
	unix.SYS_IO_SETUP, unix.SYS_IO_URING_SETUP, unix.SYS_IO_URING_ENTER, unix.SYS_IO_URING_REGISTER,
	unix.SYS_OPEN_TREE, unix.SYS_MOVE_MOUNT, unix.SYS_FSOPEN, unix.SYS_FSCONFIG,
	unix.SYS_FSMOUNT, unix.SYS_FSPICK, unix.SYS_MOUNT_SETATTR,
	467, // open_tree_attr, Linux 6.15
}

// newNamespaces are the flags of clone(2) that make one.
const newNamespaces = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS |
	unix.CLONE_NEWIPC | unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET

// personalities that are harmless: none, without address randomisation (gdb), as
// uname on a 32-bit machine, and the question which one is set.
var personalities = []uint32{0, 0x0040000, 0x0008, 0xffffffff}

// families of sockets a job may open. Of netlink only NETLINK_ROUTE, protocol 0.
var families = []uint32{unix.AF_UNIX, unix.AF_INET, unix.AF_INET6}

// Filter returns the filter as struct sock_filter[], what bwrap --seccomp
// reads. Each rule that looks at arguments ends the filter for its call, so that the
// kernel can cache the verdict of all others.
func Filter() ([]byte, error) { return filter(nil) }

// filter is Filter with more calls, which fail with EMFILE.
func filter(crowded []uint32) ([]byte, error) {
	arch, ok := auditArch[runtime.GOARCH]
	if !ok {
		return nil, fmt.Errorf("no seccomp filter for %s", runtime.GOARCH)
	}
	p := []bpf.Instruction{
		bpf.LoadAbsolute{Off: offArch, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: arch, SkipTrue: 1},
		bpf.RetConstant{Val: unix.SECCOMP_RET_KILL_PROCESS}, // 32-bit calls: other numbers
		bpf.LoadAbsolute{Off: offNr, Size: 4},
	}
	if runtime.GOARCH == "amd64" { // x32 has the same arch and other numbers
		p = append(p, bpf.JumpIf{Cond: bpf.JumpLessThan, Val: 0x40000000, SkipTrue: 1}, fail(unix.ENOSYS))
	}
	p = append(p, rule(unix.SYS_IOCTL, ioctlRule())...)
	p = append(p, rule(unix.SYS_CLONE, cloneRule())...)
	p = append(p, rule(unix.SYS_SOCKET, socketRule())...)
	p = append(p, rule(unix.SYS_SOCKETPAIR, onlyRule(0, families[:1], unix.EAFNOSUPPORT))...)
	p = append(p, rule(unix.SYS_PERSONALITY, onlyRule(0, personalities, unix.EPERM))...)
	for _, nr := range slices.Concat(forbidden, archForbidden) {
		p = append(p, rule(nr, []bpf.Instruction{fail(unix.EPERM)})...)
	}
	for _, nr := range absent {
		p = append(p, rule(nr, []bpf.Instruction{fail(unix.ENOSYS)})...)
	}
	for _, nr := range crowded {
		p = append(p, rule(nr, []bpf.Instruction{fail(unix.EMFILE)})...)
	}
	return assemble(append(p, allow))
}

// Install puts the filter on every thread of this process, for good and for all it
// starts. It takes no privilege. It also refuses inotify: in a container an instance counts
// as one of the machine's root, who has 128 (fs.inotify.max_user_instances), even where
// the engine maps users. Programs fall back to looking now and then, as tail -f does.
func Install() error {
	raw, err := filter(inotify)
	if err != nil {
		return err
	}
	var rules []unix.SockFilter
	for ; len(raw) > 0; raw = raw[8:] {
		rules = append(rules, unix.SockFilter{Code: binary.NativeEndian.Uint16(raw), Jt: raw[2], Jf: raw[3], K: binary.NativeEndian.Uint32(raw[4:])})
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no new privileges: %w", err)
	}
	prog := unix.SockFprog{Len: uint16(len(rules)), Filter: &rules[0]}
	thread, _, e := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog)))
	if e != 0 {
		return fmt.Errorf("install seccomp filter: %w", e)
	}
	if thread != 0 {
		return fmt.Errorf("install seccomp filter: thread %d has another", thread)
	}
	return nil
}

// auditArch is AUDIT_ARCH_* of <linux/audit.h> by GOARCH: little endian 64-bit
// machines, which is what arg relies on.
var auditArch = map[string]uint32{
	"amd64":   unix.AUDIT_ARCH_X86_64,
	"arm64":   unix.AUDIT_ARCH_AARCH64,
	"ppc64le": unix.AUDIT_ARCH_PPC64LE,
}

var allow = bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW}

func fail(errno unix.Errno) bpf.Instruction {
	return bpf.RetConstant{Val: unix.SECCOMP_RET_ERRNO | uint32(errno)}
}

// arg loads the lower half of argument n.
func arg(n uint32) bpf.Instruction { return bpf.LoadAbsolute{Off: offArgs + 8*n, Size: 4} }

// rule runs body, which must end in a return on every path, for call nr alone.
func rule(nr uint32, body []bpf.Instruction) []bpf.Instruction {
	return append([]bpf.Instruction{
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: nr, SkipTrue: uint8(len(body))},
	}, body...)
}

// ioctlRule refuses to type into somebody else's terminal (CVE-2017-5226).
func ioctlRule() []bpf.Instruction {
	return []bpf.Instruction{
		arg(1),
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.TIOCSTI, SkipTrue: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: tioclinux, SkipTrue: 1},
		allow,
		fail(unix.EPERM),
	}
}

const tioclinux = 0x541C // the console's selection can be pasted

func cloneRule() []bpf.Instruction {
	return []bpf.Instruction{
		arg(0),
		bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: newNamespaces, SkipTrue: 1},
		allow,
		fail(unix.EPERM),
	}
}

func socketRule() []bpf.Instruction {
	return append([]bpf.Instruction{
		arg(0),
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.AF_NETLINK, SkipTrue: 3},
		arg(2),
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.NETLINK_ROUTE, SkipTrue: 1},
		allow,
	}, onlyRule(0, families, unix.EAFNOSUPPORT)...)
}

// onlyRule allows the call when argument n is one of values.
func onlyRule(n uint32, values []uint32, errno unix.Errno) []bpf.Instruction {
	body := []bpf.Instruction{arg(n)}
	for i, v := range values {
		body = append(body, bpf.JumpIf{Cond: bpf.JumpEqual, Val: v, SkipTrue: uint8(len(values) - i)})
	}
	return append(body, fail(errno), allow)
}

func assemble(p []bpf.Instruction) ([]byte, error) {
	raw, err := bpf.Assemble(p)
	if err != nil {
		return nil, fmt.Errorf("assemble seccomp filter: %w", err)
	}
	b := make([]byte, 0, 8*len(raw))
	for _, r := range raw {
		b = binary.NativeEndian.AppendUint16(b, r.Op)
		b = append(b, r.Jt, r.Jf)
		b = binary.NativeEndian.AppendUint32(b, r.K)
	}
	return b, nil
}
