package boxtest

import (
	"fmt"
	"net"
	"os"
	"runtime"
	"strconv"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// attack runs inside a box and says how far it came.
func attack(args []string) int {
	n := 0
	if len(args) > 1 {
		n, _ = strconv.Atoi(args[1])
	}
	switch args[0] {
	case "calls":
		for name, c := range calls {
			what := "worked"
			if e := c.try(); e != 0 {
				what = unix.ErrnoName(e)
			}
			fmt.Printf("%s: %s\n", name, what)
		}
	case "memory":
		b, err := unix.Mmap(-1, 0, n<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
		if err != nil {
			fmt.Println(err)
			return 1
		}
		for i := 0; i < len(b); i += 4096 {
			b[i] = 1
		}
		fmt.Println("survived")
	case "sockets":
		fmt.Println(fillSockets(n << 20))
	case "fork":
		fmt.Printf("forked %d\n", forkUpTo(n))
	case "hoard":
		hoard()
	case "starve":
		for r := range 16 { // RLIMIT_*
			unix.Prlimit(1, r, &unix.Rlimit{}, nil)
		}
	case "deep":
		for range n {
			if os.Mkdir("d", 0o755) != nil || os.Chdir("d") != nil {
				break
			}
		}
	case "files":
		for i := range n {
			f, err := os.Create(strconv.Itoa(i))
			if err != nil {
				fmt.Println(err)
				return 1
			}
			f.Close()
		}
	}
	return 0
}

// fillSockets writes to TCP connections that nobody reads until enough bytes wait in
// them or no more are taken, and returns how many MiB that were.
func fillSockets(enough int) int {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0
	}
	var sum int
	b := make([]byte, 1<<20)
	for full := 0; full < 5; full++ { // connections in a row that took next to nothing
		before := sum
		c, err := net.DialTimeout("tcp", l.Addr().String(), time.Second)
		if err != nil {
			break
		}
		c.(*net.TCPConn).SetWriteBuffer(8 << 20)
		for sum < enough {
			c.SetWriteDeadline(time.Now().Add(20 * time.Millisecond))
			n, err := c.Write(b)
			sum += n
			if err != nil {
				break
			}
		}
		defer c.Close() // not before the end: they have to hold what they hold
		if sum >= enough {
			break
		}
		if sum-before > 256<<10 {
			full = -1
		}
	}
	return sum >> 20
}

// forkUpTo forks children that do nothing, until it may not. They make raw calls
// only: Go's runtime does not live on after a fork.
func forkUpTo(n int) (forked int) {
	runtime.LockOSThread()
	for range n {
		pid, _, e := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
		if e != 0 {
			break
		}
		if pid == 0 {
			for {
				unix.RawSyscall6(unix.SYS_PPOLL, 0, 0, 0, 0, 0, 0)
			}
		}
		forked++
	}
	return forked
}

// hoards are calls that take one more of what the kernel counts beyond a box.
var hoards = map[string]func() unix.Errno{
	"inotify": call(unix.SYS_INOTIFY_INIT1, 0),
	"libaio": func() unix.Errno { // until the process ends
		var context uint64
		_, _, e := unix.RawSyscall(unix.SYS_IO_SETUP, 1000, uintptr(unsafe.Pointer(&context)), 0)
		return e
	},
	"timers": func() unix.Errno { // each is a signal that may have to wait
		var id int32
		_, _, e := unix.RawSyscall(unix.SYS_TIMER_CREATE, unix.CLOCK_MONOTONIC, 0, uintptr(unsafe.Pointer(&id)))
		return e
	},
}

// hoard says how many of each it got.
func hoard() {
	for name, take := range hoards {
		n, e := 0, unix.Errno(0)
		for ; n < 200_000 && e == 0; n++ {
			e = take()
		}
		fmt.Printf("%s: %d, then %s\n", name, n-1, unix.ErrnoName(e))
	}
	fmt.Println("hoarded")
	time.Sleep(time.Hour)
}

func call(nr uintptr, a ...uintptr) func() unix.Errno {
	return func() unix.Errno {
		var args [6]uintptr
		copy(args[:], a)
		_, _, e := unix.RawSyscall6(nr, args[0], args[1], args[2], args[3], args[4], args[5])
		return e
	}
}

const (
	refused = "EPERM ENOSYS EACCES"
	worked  = "worked"
)

// calls are ways to the kernel and what must come of them. A call that would fail
// with EPERM for want of a capability alone says nothing about a filter; these are
// chosen so that without one they would fail otherwise, or work.
var calls = map[string]struct {
	try  func() unix.Errno
	want string
}{
	"unshare user":     {call(unix.SYS_UNSHARE, unix.CLONE_NEWUSER), refused},
	"unshare nothing":  {call(unix.SYS_UNSHARE, 0), refused},
	"clone newuser":    {call(unix.SYS_CLONE, unix.CLONE_NEWUSER|uintptr(unix.SIGCHLD)), refused},
	"clone upper half": {call(unix.SYS_CLONE, 1<<40|unix.CLONE_NEWUSER|uintptr(unix.SIGCHLD)), refused},
	"clone3":           {call(unix.SYS_CLONE3, 0, 0), refused},
	"setns":            {call(unix.SYS_SETNS, ^uintptr(0), 0), refused},
	"mount":            {call(unix.SYS_MOUNT, 0, 0, 0, 0, 0), refused},
	"umount":           {call(unix.SYS_UMOUNT2, 0, 0), refused},
	"fsopen":           {call(unix.SYS_FSOPEN, 0, 0), refused},
	"io_uring_setup":   {call(unix.SYS_IO_URING_SETUP, 0, 0), refused},
	"io_uring_enter":   {call(unix.SYS_IO_URING_ENTER, ^uintptr(0), 0, 0, 0, 0), refused},
	"keyctl":           {call(unix.SYS_KEYCTL, 0, ^uintptr(2), 0), refused}, // get the session keyring's id
	"bpf":              {call(unix.SYS_BPF, ^uintptr(0), 0, 0), refused},
	"perf_event_open":  {call(unix.SYS_PERF_EVENT_OPEN, 0, 0, 0, 0, 0), refused},
	"userfaultfd":      {call(unix.SYS_USERFAULTFD, ^uintptr(0)), refused},
	"personality":      {call(unix.SYS_PERSONALITY, 0x0400000), refused}, // READ_IMPLIES_EXEC
	"personality ask":  {call(unix.SYS_PERSONALITY, 0xffffffff), worked},
	"tiocsti":          {tiocsti(0), refused},
	"tiocsti upper":    {tiocsti(1 << 40), refused}, // the kernel looks at the lower half
	"socket vsock":     {call(unix.SYS_SOCKET, unix.AF_VSOCK, unix.SOCK_STREAM, 0), "EAFNOSUPPORT"},
	"socket alg":       {call(unix.SYS_SOCKET, unix.AF_ALG, unix.SOCK_SEQPACKET, 0), "EAFNOSUPPORT"},
	"socket audit":     {call(unix.SYS_SOCKET, unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_AUDIT), "EAFNOSUPPORT"},
	"socket netfilter": {call(unix.SYS_SOCKET, unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_NETFILTER), "EAFNOSUPPORT"},
	"socket route":     {call(unix.SYS_SOCKET, unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE), worked},
	"socket inet":      {call(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_STREAM, 0), worked},
	"socketpair unix":  {socketpair, worked},
}

// The conversions to uintptr stand in the call itself, or the pointers would be stale.

func socketpair() unix.Errno {
	var fds [2]int32
	_, _, e := unix.RawSyscall6(unix.SYS_SOCKETPAIR, unix.AF_UNIX, unix.SOCK_STREAM, 0, uintptr(unsafe.Pointer(&fds)), 0, 0)
	return e
}

func tiocsti(upper uintptr) func() unix.Errno {
	return func() unix.Errno {
		c := byte('x')
		_, _, e := unix.RawSyscall(unix.SYS_IOCTL, 0, upper|unix.TIOCSTI, uintptr(unsafe.Pointer(&c)))
		return e
	}
}
