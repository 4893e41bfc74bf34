package shim

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/rai-project/raid/runner/job"
)

// attack is what a student's program could do to PID 1 with a few system calls: send
// each signal in such a way that it does not look like kill(2), twice.
func attack() int {
	pid := uintptr(1)
	var p [2]int
	if err := unix.Pipe(p[:]); err != nil {
		panic(err)
	}
	for sig := 1; sig <= 64; sig++ {
		var info [128]byte // siginfo_t: signo, errno, code
		*(*int32)(unsafe.Pointer(&info[0])) = int32(sig)
		*(*int32)(unsafe.Pointer(&info[8])) = -1 // SI_QUEUE
		unix.RawSyscall(unix.SYS_RT_SIGQUEUEINFO, pid, uintptr(sig), uintptr(unsafe.Pointer(&info)))
		unix.RawSyscall(unix.SYS_TGKILL, pid, pid, uintptr(sig))

		unix.FcntlInt(uintptr(p[0]), unix.F_SETOWN, int(pid)) // the kernel sends it for us
		unix.FcntlInt(uintptr(p[0]), 10 /* F_SETSIG */, sig)
		unix.FcntlInt(uintptr(p[0]), unix.F_SETFL, unix.O_ASYNC)
		unix.Write(p[1], []byte("x"))
	}
	fmt.Println("attacked")
	return 0
}

// hostile runs steps in a box behind wrap, with $EXE as the attacker.
func hostile(t *testing.T, wrap []string, steps ...string) report {
	t.Helper()
	b := newBox(t, time.Second, wrap...)
	b.order(job.BoxOrder{Spec: job.Spec{Steps: steps}, Env: []string{roleVar + "=attack", "EXE=" + os.Getenv(exeVar)}})
	return b.wait()
}

func TestStepsCannotEndThePID1(t *testing.T) {
	for _, tt := range []struct {
		name, line, out string
		exit            int
	}{
		{"every signal", `for i in {1..64}; do kill -$i 1 2>/dev/null; done; echo alive`, "alive\n", 0},
		{"signals that look like faults", `"$EXE"; "$EXE"`, "attacked\nattacked\n", 0},
		{"all processes", `sleep 1000 & kill -9 -1; echo alive`, "alive\n", 0},
		{"the shell itself", `kill -9 $$`, "", 137},
		{"not PID 1", `echo $PPID; ls /proc | grep -c '^[0-9]*$' | grep -qv '^1$'`, "1\n", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := hostile(t, namespace(t), tt.line)
			if r.out != tt.out || r.Exit != tt.exit {
				t.Errorf("exit %d, stdout %q, stderr %q; want %d, %q", r.Exit, r.out, r.err, tt.exit, tt.out)
			}
		})
	}
}

func TestStepsCannotLookIntoPID1(t *testing.T) {
	for _, tt := range []struct {
		line string
		root bool // denied to root without capabilities too
	}{
		{"cat /proc/1/environ", true}, {"cat /proc/1/mem", true}, {"readlink /proc/1/exe", true}, {"cat /proc/1/maps", true},
		{"readlink /proc/1/fd/10", true}, {"echo x >/proc/1/fd/1", true}, {"echo x >/proc/1/fd/11", true},
		{"ls /proc/1/fd/", false}, {"ls /proc/1/map_files/", true}, {"echo 1000 >/proc/1/oom_score_adj", false},
	} {
		if r := hostile(t, namespace(t), tt.line+" && echo open"); r.Exit == 0 || r.out != "" {
			t.Errorf("%s: exit %d, stdout %q; want it denied", tt.line, r.Exit, r.out)
		}
		if tt.root && os.Getuid() == 0 {
			if r := hostile(t, rootNamespace(t), tt.line+" && echo open"); r.Exit == 0 || r.out != "" {
				t.Errorf("%s as root: exit %d, stdout %q; want it denied", tt.line, r.Exit, r.out)
			}
		}
	}
}

// pidsGroup returns a command that puts what follows into a control group of n processes.
func pidsGroup(t *testing.T, n int) []string {
	t.Helper()
	need(t, os.Getuid() == 0, "root, for a control group")
	for _, root := range []string{"/sys/fs/cgroup/pids", "/sys/fs/cgroup"} {
		dir := filepath.Join(root, fmt.Sprintf("raid-shim-test-%d", os.Getpid()))
		if os.Mkdir(dir, 0o755) != nil {
			continue
		}
		t.Cleanup(func() { os.Remove(dir) })
		if os.WriteFile(filepath.Join(dir, "pids.max"), fmt.Appendf(nil, "%d", n), 0o644) == nil {
			return []string{"sh", "-c", `echo $$ >"$0/cgroup.procs" && exec "$@"`, dir}
		}
	}
	need(t, false, "a pids control group")
	return nil
}

func TestForkBomb(t *testing.T) {
	r := hostile(t, append(pidsGroup(t, 100), namespace(t)...), `trap '' TERM; :(){ :|:& };: 2>/dev/null; sleep 1 2>/dev/null; echo lit`, "echo after")
	if r.Reason != job.ReasonExit || !strings.Contains(r.out, "lit\n") {
		t.Errorf("result %+v, stdout %q, raid %q", r.Result, r.out, r.raid)
	}
	if r.Exit != 0 || !strings.HasSuffix(r.out, "after\n") {
		t.Errorf("exit %d, stdout %q, raid %q; want the next step to run", r.Exit, r.out, r.raid)
	}
}

func TestForkBombIsEndedByTheTimeLimit(t *testing.T) {
	b := newBox(t, 100*time.Millisecond, append(pidsGroup(t, 100), namespace(t)...)...)
	b.order(job.BoxOrder{Spec: job.Spec{Limits: job.Limits{Time: time.Second}, Steps: []string{
		`trap '' TERM; exec 2>/dev/null; :(){ :|:& };:; while :; do (:); done; echo never`}}})
	if r := b.wait(); r.Reason != job.ReasonTimeout || r.Exit != job.ExitTimeout {
		t.Errorf("result %+v, want a timeout", r.Result)
	}
}

// A descriptor that is on its way through a socket stays open without a process.
func TestOutputEndsThoughADescriptorIsInFlight(t *testing.T) {
	need(t, os.Getenv("PATH") != "" && exists("/usr/bin/python3"), "python3")
	r := hostile(t, namespace(t), `python3 -c '
import socket, array
a, b = socket.socketpair()
for s in (a, b):
    s.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [1, 2, a.fileno(), b.fileno()]))])
print("sent")'`)
	if r.Exit != 0 || r.out != "sent\n" {
		t.Errorf("exit %d, stdout %q, stderr %q", r.Exit, r.out, r.err)
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
