package shim

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/rai-project/raid/runner/job"
)

const (
	// outFrame is the most one frame of output carries. With its header it is half of
	// what the runner reads at once, so a loud job's frames never straddle two reads.
	outFrame = 128<<10 - job.HeaderLen
	// outPipe is what the pipe of a step holds: it fills one frame while another is sent.
	outPipe = 256 << 10
	// ttyFrame is the same of a terminal: N_TTY_BUF_SIZE.
	ttyFrame = 4 << 10
	// maxPipe is the most that a pipe can hold without privilege: fs.pipe-max-size.
	maxPipe = 1 << 20
)

// A stream carries what the steps write to the wire, through a pipe or a terminal.
type stream struct {
	kind   job.Kind
	tty    bool
	wire   *wire
	reader *os.File
	writer *os.File // what a step gets

	mu  sync.Mutex // makes reading and sending one act, so that order is kept
	buf []byte     // a frame, with room for its header in front
}

// newPipe opens a stream through a pipe.
func newPipe(k job.Kind, w *wire) (*stream, error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return nil, fmt.Errorf("open a pipe: %w", err)
	}
	// Only our end must not block: a step expects a standard output that does.
	if err := unix.SetNonblock(p[0], true); err != nil {
		return nil, fmt.Errorf("open a pipe: %w", err)
	}
	unix.FcntlInt(uintptr(p[0]), unix.F_SETPIPE_SZ, outPipe) // refused to a user with many pipes: then it is slower
	return newStream(k, w, p[0], p[1], outFrame), nil
}

func newStream(k job.Kind, w *wire, read, write, frame int) *stream {
	return &stream{
		kind:   k,
		wire:   w,
		reader: os.NewFile(uintptr(read), "output"),
		writer: os.NewFile(uintptr(write), "step"),
		buf:    make([]byte, job.HeaderLen+frame),
	}
}

// endOfInput is what a terminal hands its readers before they would wait for somebody
// to type: Ctrl-D, so often that no step wants more.
var endOfInput = strings.Repeat("\x04", 64)

// newTTY opens a stream through a new terminal of 80 columns and 24 rows. Its slave is
// meant for one step's input and output.
func newTTY(w *wire) (*stream, error) {
	master, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/ptmx: %w", err)
	}
	slave, err := openSlave(master)
	if err != nil {
		unix.Close(master)
		return nil, err
	}
	unix.Write(master, []byte(endOfInput))
	s := newStream(job.Out, w, master, slave, ttyFrame)
	s.tty = true
	return s, nil
}

// openSlave sets up the terminal behind master and opens its other side.
func openSlave(master int) (int, error) {
	if err := unix.IoctlSetPointerInt(master, unix.TIOCSPTLCK, 0); err != nil {
		return 0, fmt.Errorf("unlock the terminal: %w", err)
	}
	n, err := unix.IoctlGetInt(master, unix.TIOCGPTN)
	if err != nil {
		return 0, fmt.Errorf("number of the terminal: %w", err)
	}
	if err := unix.IoctlSetWinsize(master, unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 80}); err != nil {
		return 0, fmt.Errorf("size of the terminal: %w", err)
	}
	name := fmt.Sprintf("/dev/pts/%d", n)
	slave, err := unix.Open(name, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open %s: %w", name, err)
	}
	return slave, nil
}

// run sends what comes until the stream ends or close is called. What one read gives
// goes out at once. A terminal ends when the last process has let go of it; its reads
// then fail with EIO.
func (s *stream) run() {
	defer s.reader.Close()
	raw, err := s.reader.SyscallConn()
	if err != nil {
		return
	}
	for more := true; more; {
		err := raw.Read(func(fd uintptr) bool {
			n, err := s.pass(int(fd))
			more = n > 0
			return err != syscall.EAGAIN // else wait in the poller and come back
		})
		if err != nil {
			return
		}
	}
}

// drain sends what is in the stream now, without waiting for more. It may run beside
// run. What keeps writing cannot keep it here for ever.
func (s *stream) drain() {
	raw, err := s.reader.SyscallConn()
	if err != nil {
		return
	}
	raw.Control(func(fd uintptr) {
		for left := maxPipe; left > 0; {
			n, _ := s.pass(int(fd))
			if n <= 0 {
				return
			}
			left -= n
		}
	})
}

// pass sends what one read gives, and returns how many bytes that were.
func (s *stream) pass(fd int) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		n, err := unix.Read(fd, s.buf[job.HeaderLen:])
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if n > 0 {
			s.wire.put(s.kind, s.buf[:job.HeaderLen+n])
		}
		return n, err
	}
}

// release closes the side that steps are given; those that have it keep it.
func (s *stream) release() { s.writer.Close() }

// close ends run. What was not drained is lost.
func (s *stream) close() {
	s.writer.Close()
	s.reader.Close()
}
