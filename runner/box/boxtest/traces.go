package boxtest

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Traces looks for whatever on this machine carries one of the marks, names of runners,
// boxes or folders that are nobody else's: processes, by their arguments and their
// cgroup, mounts, loop devices, cgroups, and what lies in the folders for temporary
// files. Each is a line for people.
func Traces(marks ...string) (found []string) {
	marked := func(text []byte) bool {
		for _, m := range marks {
			if bytes.Contains(text, []byte(m)) {
				return true
			}
		}
		return false
	}
	for _, fd := range processes(marked) {
		found = append(found, "process "+describe(fd))
		unix.Close(fd)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		found = append(found, err.Error())
	}
	for line := range bytes.Lines(mounts) {
		if marked(line) {
			found = append(found, "mount "+strings.TrimSpace(string(line)))
		}
	}
	return append(append(found, loops(marked)...), files(marked)...)
}

// lingers is how long a loop device may outlive the last who wanted it. Who looked for a
// free one at the same time has it open until told that it is taken, and a fork has all
// that its parent had until it becomes another program; both may have to wait for a
// processor. The kernel frees it when they are done, and tells nobody.
const lingers = 10 * time.Second

// loops are the loop devices of marked files.
func loops(marked func([]byte) bool) (found []string) {
	backing, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, f := range backing {
		b, _ := os.ReadFile(f)
		for end := time.Now().Add(lingers); marked(b) && time.Now().Before(end); b, _ = os.ReadFile(f) {
			time.Sleep(time.Millisecond)
		}
		if marked(b) {
			found = append(found, fmt.Sprintf("loop device %s of %s", f, b))
		}
	}
	return found
}

// files are what the kernel and the machine show as files.
func files(marked func([]byte) bool) (found []string) {
	filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && marked([]byte(d.Name())) {
			found = append(found, path)
			return filepath.SkipDir
		}
		return nil
	})
	for _, root := range []string{"/var/tmp", os.TempDir(), "/run"} { // not all of it: others keep much there
		for _, below := range []string{"*", "raid-*/*", "raid-*/*/*"} {
			paths, _ := filepath.Glob(filepath.Join(root, below))
			for _, p := range paths {
				if marked([]byte(filepath.Base(p))) {
					found = append(found, p)
				}
			}
		}
	}
	return found
}

// processes returns a pidfd of every other process whose arguments or cgroup are marked.
func processes(marked func([]byte) bool) (fds []int) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		line, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		group, _ := os.ReadFile(filepath.Join(dir, "cgroup"))
		pid, err := strconv.Atoi(filepath.Base(dir))
		// Without arguments it is dead, and waits for a parent that is not ours.
		if err != nil || pid == os.Getpid() || len(line) == 0 || !marked(line) && !marked(group) {
			continue
		}
		if fd, err := unix.PidfdOpen(pid, 0); err == nil {
			fds = append(fds, fd)
		}
	}
	return fds
}

// carries is the mark of one name.
func carries(name string) func([]byte) bool {
	return func(text []byte) bool { return bytes.Contains(text, []byte(name)) }
}

// describe says all that a stray process lets be known of itself.
func describe(fd int) string {
	info, _ := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	_, pid, _ := strings.Cut(string(info), "\nPid:\t")
	pid, _, _ = strings.Cut(pid, "\n")
	status, err := os.ReadFile("/proc/" + pid + "/status")
	line, _ := os.ReadFile("/proc/" + pid + "/cmdline")
	return fmt.Sprintf("%s %q %.300q %v", pid, status[:min(len(status), 200)], line, err)
}
