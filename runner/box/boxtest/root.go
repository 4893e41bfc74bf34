package boxtest

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// programs are what the suite's boxes call.
var programs = []string{"bash", "sh", "ls", "cat", "head", "wc", "touch", "grep", "cut", "tr", "id", "whoami", "hostname", "env",
	"sleep", "mkdir", "chmod", "setsid", "readlink", "find", "getent", "mount", "unshare", "test", "echo", "true", "rm", "seq", "ln", "mkfifo", "mknod", "truncate", "dd", "stat", "tail", "cp", "chown"}

// WriteRoot writes a small root file system as a tar: programs of this machine with the
// libraries they need, and those that the programs in more need. It is an image for
// engines where there is no registry to get one from.
func WriteRoot(w io.Writer, more ...string) error {
	r := &rootTar{w: tar.NewWriter(w), seen: map[string]bool{}}
	for _, dir := range []string{"tmp", "var/tmp", "home", "root", "etc", "proc", "dev", "sys", "usr"} {
		r.dir(dir)
	}
	for _, link := range []string{"/bin", "/sbin", "/lib", "/lib64"} {
		r.path(link)
	}
	r.text("etc/passwd", "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/nonexistent:/bin/sh\n")
	r.text("etc/group", "root:x:0:\nnogroup:x:65534:\n")
	r.text("etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files\n")
	var files []string
	for _, name := range programs {
		file, err := exec.LookPath(name)
		if err != nil {
			return err
		}
		files = append(files, file)
	}
	for _, f := range slices.Concat(files, more) {
		libs, err := libraries(f)
		if err != nil {
			return err
		}
		for _, l := range libs {
			r.path(l)
		}
	}
	for _, f := range files {
		r.path(f)
	}
	return errors.Join(r.err, r.w.Close())
}

// libraries asks the dynamic linker what a program needs: nothing if it is static.
func libraries(file string) (paths []string, err error) {
	out, err := exec.Command("ldd", file).CombinedOutput()
	if err != nil && !strings.Contains(string(out), "not a dynamic executable") {
		return nil, fmt.Errorf("ldd %s: %w: %s", file, err, out)
	}
	for word := range strings.FieldsSeq(string(out)) {
		if strings.HasPrefix(word, "/") && !strings.HasSuffix(word, ":") {
			paths = append(paths, word)
		}
	}
	return paths, nil
}

// A rootTar writes each name once, and the folders above it before it.
type rootTar struct {
	w    *tar.Writer
	seen map[string]bool
	err  error
}

func (r *rootTar) put(h *tar.Header, body io.Reader) {
	if r.seen[h.Name] || r.err != nil {
		return
	}
	r.seen[h.Name] = true
	if parent := filepath.Dir(h.Name); parent != "." {
		r.dir(parent)
	}
	if r.err == nil {
		r.err = r.w.WriteHeader(h)
	}
	if body != nil && r.err == nil {
		_, r.err = io.Copy(r.w, body)
	}
}

func (r *rootTar) dir(name string) {
	mode := int64(0o755)
	if strings.HasSuffix(name, "tmp") {
		mode = 0o1777
	}
	r.put(&tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: mode}, nil)
}

func (r *rootTar) text(name, text string) {
	r.put(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(text))}, strings.NewReader(text))
}

// path adds a file or link of this machine, and what a link leads to.
func (r *rootTar) path(name string) {
	for dir := filepath.Dir(name); dir != "/"; dir = filepath.Dir(dir) { // /lib64/x is really in /usr/lib64
		if to, err := os.Readlink(dir); err == nil {
			r.path(dir)
			if !filepath.IsAbs(to) {
				to = filepath.Join(filepath.Dir(dir), to)
			}
			name = filepath.Join(to, strings.TrimPrefix(name, dir))
		}
	}
	i, err := os.Lstat(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		r.err = errors.Join(r.err, err)
	case i.Mode()&fs.ModeSymlink != 0:
		to, err := os.Readlink(name)
		r.err = errors.Join(r.err, err)
		r.put(&tar.Header{Name: name[1:], Typeflag: tar.TypeSymlink, Linkname: to, Mode: 0o777}, nil)
		if !filepath.IsAbs(to) {
			to = filepath.Join(filepath.Dir(name), to)
		}
		r.path(to)
	case i.IsDir():
		r.dir(name[1:])
	default:
		r.file(name, i)
	}
}

func (r *rootTar) file(name string, i fs.FileInfo) {
	if r.seen[name[1:]] {
		return
	}
	f, err := os.Open(name)
	if err != nil {
		r.err = errors.Join(r.err, err)
		return
	}
	defer f.Close()
	r.put(&tar.Header{Name: name[1:], Typeflag: tar.TypeReg, Mode: int64(i.Mode().Perm()), Size: i.Size()}, f)
}
