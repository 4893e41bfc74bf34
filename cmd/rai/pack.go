package main

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/klauspost/compress/zstd"

	"github.com/rai-project/raid/runner/job/tree"
)

// buildFile is the name that raid looks for.
const buildFile = "rai_build.yml"

// A parcel is the folder as a compressed tar, made while it is read.
type parcel struct {
	*io.PipeReader
	done chan struct{}
	err  error // set before done closes
}

// errStopped makes the packer stop when nobody reads on.
var errStopped = errors.New("stopped")

// Close stops the packer, waits for it and returns what went wrong in it. A folder
// that was only read in part is no error here: whoever stopped reading knows why.
func (p *parcel) Close() error {
	p.PipeReader.CloseWithError(errStopped)
	<-p.done
	if errors.Is(p.err, errStopped) {
		return nil
	}
	return p.err
}

// pack begins to pack the folder.
func (a *app) pack() *parcel {
	r, w := io.Pipe()
	p := &parcel{PipeReader: r, done: make(chan struct{})}
	go func() {
		defer close(p.done)
		p.err = a.packTo(w)
		w.CloseWithError(p.err) // nil is a clean end
	}()
	return p
}

// packTo writes the compressed tar to w. The fastest level keeps ahead of any line
// between a student and a server.
func (a *app) packTo(w io.Writer) error {
	z, err := zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		return fmt.Errorf("pack: %w", err)
	}
	defer z.Close()
	if a.build != "" {
		if err := addBuildFile(z, a.build); err != nil {
			return err
		}
	}
	ig := newIgnorer(a.path)
	done, err := tree.Pack(z, a.path, tree.PackOptions{Skip: a.skipper(ig)})
	if err != nil {
		return err
	}
	if err := z.Close(); err != nil {
		return fmt.Errorf("pack: %w", err)
	}
	a.sayPacked(done, ig)
	return nil
}

// addBuildFile writes one entry in front of the folder's own tar.
func addBuildFile(w io.Writer, file string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("build file: %w", err)
	}
	t := tar.NewWriter(w)
	h := &tar.Header{Name: buildFile, Mode: 0o644, Size: int64(len(text)), Typeflag: tar.TypeReg}
	if err := t.WriteHeader(h); err != nil {
		return fmt.Errorf("build file: %w", err)
	}
	if _, err := t.Write(text); err != nil {
		return fmt.Errorf("build file: %w", err)
	}
	return t.Flush() // and no Close: what follows belongs to the same tar
}

// skipper says what stays at home: what the ignore rules name, git's own folder,
// profiles, the key we log in with and what an earlier run put into --output.
func (a *app) skipper(ig *ignorer) func(rel string, dir bool) bool {
	own := map[string]bool{}
	for _, f := range []string{a.keyFile, a.output} {
		if rel, ok := a.within(f); ok {
			own[rel] = true
		}
	}
	return func(rel string, dir bool) bool {
		base := path.Base(rel)
		switch {
		case rel == buildFile && !dir:
			return a.build != "" // never ignored: nothing runs without it
		case base == ".git" || isProfile(base) && !dir:
			return true
		case own[rel]:
			return true
		}
		return ig.skip(rel, dir)
	}
}

func isProfile(base string) bool {
	return strings.HasPrefix(base, ".rai_profile") || base == ".rai_env" || base == ".rai.profile" || base == ".rai.env" ||
		strings.HasSuffix(base, ".rai_profile")
}

// within returns file's path below the packed folder, if it is there.
func (a *app) within(file string) (string, bool) {
	if file == "" {
		return "", false
	}
	root, err := filepath.Abs(a.path)
	if err != nil {
		return "", false
	}
	abs, err := filepath.Abs(file)
	if err != nil {
		return "", false
	}
	rel, err := filepath.Rel(root, abs)
	if err != nil || rel == "." || !filepath.IsLocal(rel) {
		return "", false
	}
	return filepath.ToSlash(rel), true
}

// sayPacked tells what went and what did not.
func (a *app) sayPacked(p tree.Packed, ig *ignorer) {
	if a.tty || a.verbose || a.debug {
		left := ""
		if ig.skipped > 0 {
			left = fmt.Sprintf("; ignore rules left out %d, the first is %q", ig.skipped, ig.first)
		}
		a.say("packed %d entries, %s%s", p.Entries, size(p.Bytes), left)
	}
	if p.LeftOut > 0 {
		a.say("could not pack %d: %s", p.LeftOut, p.FirstLeftOut)
	}
	if p.Changed > 0 {
		a.say("%d files changed while they were packed", p.Changed)
	}
}
