package seccomp

import (
	"encoding/binary"
	"runtime"
	"testing"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// TestFilter runs the filter on calls that a box cannot be made to do.
func TestFilter(t *testing.T) {
	raw, err := Filter()
	if err != nil {
		t.Fatal(err)
	}
	var prog []bpf.Instruction
	for ; len(raw) > 0; raw = raw[8:] {
		prog = append(prog, bpf.RawInstruction{Op: binary.NativeEndian.Uint16(raw), Jt: raw[2], Jf: raw[3], K: binary.NativeEndian.Uint32(raw[4:])}.Disassemble())
	}
	vm, err := bpf.NewVM(prog)
	if err != nil {
		t.Fatal(err)
	}
	const (
		eperm  = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
		enosys = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
		noFam  = unix.SECCOMP_RET_ERRNO | uint32(unix.EAFNOSUPPORT)
		ok     = unix.SECCOMP_RET_ALLOW
	)
	here := auditArch[runtime.GOARCH]
	for _, c := range []struct {
		name     string
		arch, nr uint32
		args     []uint32
		want     uint32
	}{
		{"read", here, unix.SYS_READ, nil, ok},
		{"ptrace", here, unix.SYS_PTRACE, nil, ok},
		{"i386 anything", unix.AUDIT_ARCH_I386, 1, nil, unix.SECCOMP_RET_KILL_PROCESS},
		{"mount", here, unix.SYS_MOUNT, nil, eperm},
		{"last of the list", here, unix.SYS_ADJTIMEX, nil, eperm},
		{"clone3", here, unix.SYS_CLONE3, nil, enosys},
		{"open_tree_attr", here, 467, nil, enosys},
		{"libaio", here, unix.SYS_IO_SETUP, nil, enosys},
		{"inotify", here, unix.SYS_INOTIFY_INIT1, nil, ok}, // bwrap's box counts for itself
		{"fork", here, unix.SYS_CLONE, []uint32{uint32(unix.SIGCHLD)}, ok},
		{"thread", here, unix.SYS_CLONE, []uint32{unix.CLONE_VM | unix.CLONE_THREAD | unix.CLONE_SIGHAND}, ok},
		{"new pid namespace", here, unix.SYS_CLONE, []uint32{unix.CLONE_NEWPID}, eperm},
		{"unix socket", here, unix.SYS_SOCKET, []uint32{unix.AF_UNIX, 1, 0}, ok},
		{"inet6 socket", here, unix.SYS_SOCKET, []uint32{unix.AF_INET6, 1, 0}, ok},
		{"route socket", here, unix.SYS_SOCKET, []uint32{unix.AF_NETLINK, 3, 0}, ok},
		{"kobject socket", here, unix.SYS_SOCKET, []uint32{unix.AF_NETLINK, 3, unix.NETLINK_KOBJECT_UEVENT}, noFam},
		{"packet socket", here, unix.SYS_SOCKET, []uint32{unix.AF_PACKET, 3, 0}, noFam},
		{"tipc pair", here, unix.SYS_SOCKETPAIR, []uint32{unix.AF_TIPC, 1, 0}, noFam},
		{"gdb", here, unix.SYS_PERSONALITY, []uint32{0x0040000}, ok},
		{"mmap zero", here, unix.SYS_PERSONALITY, []uint32{0x0100000}, eperm},
		{"winsize", here, unix.SYS_IOCTL, []uint32{0, unix.TIOCGWINSZ}, ok},
		{"sti", here, unix.SYS_IOCTL, []uint32{0, unix.TIOCSTI}, eperm},
		{"linux", here, unix.SYS_IOCTL, []uint32{0, tioclinux}, eperm},
	} {
		// The VM reads big endian, the kernel native: so each word is laid out for it.
		b := make([]byte, 64)
		binary.BigEndian.PutUint32(b[offNr:], c.nr)
		binary.BigEndian.PutUint32(b[offArch:], c.arch)
		for i, a := range c.args {
			binary.BigEndian.PutUint32(b[offArgs+8*i:], a)
		}
		if got, err := vm.Run(b); err != nil || uint32(got) != c.want {
			t.Errorf("%s: %#x, %v, want %#x", c.name, got, err, c.want)
		}
	}
	if runtime.GOARCH == "amd64" {
		b := make([]byte, 64)
		binary.BigEndian.PutUint32(b[offNr:], 0x40000000) // x32's read
		binary.BigEndian.PutUint32(b[offArch:], here)
		if got, _ := vm.Run(b); uint32(got) != enosys {
			t.Errorf("x32: %#x, want %#x", got, enosys)
		}
	}
}
