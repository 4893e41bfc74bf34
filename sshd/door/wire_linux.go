package door

import (
	"io"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// pollable gives access to the descriptor of nc, if it has one.
func pollable(nc net.Conn) syscall.RawConn {
	tcp, ok := nc.(*net.TCPConn)
	if !ok {
		return nil
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return nil
	}
	return raw
}

// readNow reads what is there into a buffer of the pool. False means that there is
// nothing: the buffer goes back, and the runtime waits for the descriptor.
func (w *wire) readNow(fd uintptr) bool {
	buf := w.buffers.read.Get().(*[readSize]byte)
	for {
		n, err := unix.Read(int(fd), buf[:])
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN:
			w.buffers.read.Put(buf)
			return false
		case n > 0:
			w.buf, w.rest, w.got = buf, buf[:n], n
			return true
		}
		w.buffers.read.Put(buf)
		w.fail = io.EOF
		if err != nil {
			w.fail = &net.OpError{Op: "read", Net: "tcp", Source: w.LocalAddr(), Addr: w.RemoteAddr(), Err: os.NewSyscallError("read", err)}
		}
		return true
	}
}

// quickAck has the last segment acknowledged now. OpenSSH's client runs Nagle's
// algorithm while it logs in: it sends half a message and waits for this ACK, which
// the kernel would hold back for 40 ms. The kernel forgets the option, so it is set
// again after each read.
func quickAck(raw syscall.RawConn) {
	if raw != nil {
		raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_QUICKACK, 1) })
	}
}
