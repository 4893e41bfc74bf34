package machine

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// A Mount is one line of a mountinfo.
type Mount struct {
	Root, At, Kind, Options string
}

// Mounts returns what is mounted for this process; within [Namespace.Do], for that one.
func Mounts() ([]Mount, error) {
	b, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return nil, err
	}
	return parseMounts(string(b)), nil
}

// parseMounts reads the text of mountinfo (proc_pid_mountinfo(5)). Lines that are
// none are passed over.
func parseMounts(text string) (ms []Mount) {
	for line := range strings.Lines(text) {
		left, right, ok := strings.Cut(line, " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if ok && len(l) >= 6 && len(r) >= 3 {
			ms = append(ms, Mount{unescape(l[3]), unescape(l[4]), r[0], r[2]})
		}
	}
	return ms
}

// unescape undoes the octal escapes of mountinfo (space, tab, newline, backslash).
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// Below turns a path in the hierarchy into one below the mount point: in a container
// the mount shows only part of it.
func (m Mount) Below(path string) string {
	if m.Root == "/" {
		return path
	}
	if rest, ok := strings.CutPrefix(path, m.Root); ok && (rest == "" || rest[0] == '/') {
		return rest
	}
	return "/"
}

// GroupOf returns a process's path in the hierarchy of controller c, "" being the
// unified one, out of the text of /proc/<pid>/cgroup.
func GroupOf(text, c string) string {
	for line := range strings.Lines(text) {
		p := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(p) != 3 {
			continue
		}
		if p[1] == c || c != "" && strings.Contains(","+p[1]+",", ","+c+",") {
			return p[2]
		}
	}
	return "/"
}

// Counter returns the number after a name in a file of names and numbers, 0 if it does
// not stand there.
func Counter(file, name string) (int, error) {
	b, err := os.ReadFile(file)
	for line := range bytes.Lines(b) {
		if f := strings.Fields(string(line)); len(f) == 2 && f[0] == name {
			return strconv.Atoi(f[1])
		}
	}
	return 0, err
}

// Folders returns the names of the folders in dir.
func Folders(dir string) (names []string) {
	es, _ := os.ReadDir(dir)
	for _, e := range es {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names
}

// maxSockets is plenty for what travels inside a box, and far from what all TCP of
// the machine may take (net.ipv4.tcp_mem).
const maxSockets = 256 << 20

// LimitSocketsV1 bounds the buffers of TCP and UDP sockets. A cgroup v1 counts them
// beside its memory, and only where a limit is set: without one a box of 256 MiB
// could fill gigabytes and slow down every connection of the machine. A cgroup v2
// counts them as memory. Best effort: kernels are built without this counter.
func LimitSocketsV1(dir string, memory int64) {
	v := int64(-1)
	if memory > 0 {
		v = min(memory, maxSockets)
	}
	Put(dir, "memory.kmem.tcp.limit_in_bytes", strconv.FormatInt(v, 10))
}

// Put writes a value to a control file that must exist.
func Put(dir, file, value string) error {
	f, err := os.OpenFile(filepath.Join(dir, file), os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}
