package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"

	"github.com/rai-project/raid/cmd/internal/cli"
	"github.com/rai-project/raid/keys/dial"
	"github.com/rai-project/raid/runner/job/tree"
)

// A submission is what the flags say about the job.
type submission struct {
	path, build, queue, kind string
	output                   string
	force, detach, json      bool
	timeout, gpus, name      string
	keyFile                  string // never packed
}

// submit sends the folder, shows what comes and ends with the job's status. chosen
// says that the folder was named, not assumed.
func (a *app) submit(ctx context.Context, chosen bool) error {
	line, err := a.line()
	if err != nil {
		return err
	}
	if err := a.checkFolders(chosen); err != nil {
		return err
	}
	c, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	push := a.pushAccount()
	if a.secret != "" {
		a.say("--secret has no meaning any more; raid knows you by your key")
	}
	parcel := a.pack()
	watch := &jobWatcher{w: a.err}
	status, err := c.Run(ctx, line, parcel, a.out, watch, push...)
	if packErr := parcel.Close(); packErr != nil && ctx.Err() == nil {
		return packErr
	}
	if err != nil {
		return a.ended(err, watch.job())
	}
	if a.output != "" && watch.job() != "" {
		if err := a.fetch(ctx, c, watch.job()); err != nil {
			if status == 0 {
				return fmt.Errorf("fetch /build: %w", err)
			}
			a.say("fetch /build: %v", err)
		}
	}
	return result(status)
}

// line is the command that raid gets. What stands after the first " -- " is the job's
// own shell line, byte for byte.
func (a *app) line() (string, error) {
	words := []string{"submit"}
	for _, f := range []struct{ flag, value string }{
		{"-q", a.queue}, {"--as", a.kind}, {"--gpus", a.gpus}, {"--timeout", a.timeout}, {"--name", a.name},
	} {
		if strings.Contains(" "+f.value+" ", " -- ") || strings.ContainsAny(f.value, "\n\x00") {
			return "", cli.Usagef("", "%s must not contain %q", f.flag, f.value)
		}
		if f.value != "" {
			words = append(words, f.flag, f.value)
		}
	}
	if a.detach {
		words = append(words, "--detach")
	}
	if a.json {
		words = append(words, "--json")
	}
	line := quote(words)
	switch {
	case a.detach && a.output != "":
		return "", cli.Usagef("fetch it later: rai output JOB | tar xf -", "--detach leaves before there is anything to put into --output")
	case !a.dashed:
		return line, nil
	case len(a.tail) == 0:
		return "", cli.Usagef("rai -- make test", "no command after --")
	case len(a.tail) == 1: // 'make && ./a': somebody quoted a shell line
		return line + " -- " + a.tail[0], nil
	}
	return line + " -- " + quote(a.tail), nil
}

// checkFolders refuses early what would fail late, or send far too much.
func (a *app) checkFolders(chosen bool) error {
	info, err := os.Stat(a.path)
	if err != nil || !info.IsDir() {
		return cli.Fail(cli.Input, fmt.Errorf("the folder %q was not found", a.path), "name one with --path")
	}
	abs, err := filepath.Abs(a.path)
	if err != nil {
		return fmt.Errorf("folder: %w", err)
	}
	home, _ := os.UserHomeDir()
	if !chosen && (abs == home || abs == filepath.Dir(abs)) {
		return cli.Usagef("name the project's folder: rai -p DIR", "%s is no project; all of it would be sent", abs)
	}
	if a.build != "" {
		if info, err := os.Stat(a.build); err != nil || !info.Mode().IsRegular() {
			return cli.Fail(cli.Input, fmt.Errorf("the build file %q was not found", a.build), "")
		}
	}
	if a.output == "" || a.force {
		return nil
	}
	if entries, err := os.ReadDir(a.output); err == nil && len(entries) > 0 {
		return cli.Usagef("--force writes into it", "the output folder %q is not empty", a.output)
	}
	return nil
}

// ended explains why Run did not give a status.
func (a *app) ended(err error, job string) error {
	which := "the job"
	if job != "" {
		which = "job " + job
	}
	switch {
	case errors.Is(err, errInterrupted):
		return cli.Fail(cli.Interrupted, fmt.Errorf("interrupted; %s is cancelled", which), "")
	case errors.Is(err, dial.ErrLost) && job != "":
		return cli.Fail(cli.Connect, fmt.Errorf("%w; job %s goes on", dial.ErrLost, job), "follow it: rai attach "+job)
	case errors.Is(err, dial.ErrLost):
		return cli.Fail(cli.Connect, err, "see whether the job was taken: rai history")
	}
	return err
}

// fetch puts a job's /build into the output folder.
func (a *app) fetch(ctx context.Context, c *dial.Client, job string) error {
	f, err := os.CreateTemp("", "rai-output-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	status, err := c.Run(ctx, "output "+job, nil, f, a.err)
	if err != nil {
		return err
	}
	if status != 0 {
		return fmt.Errorf("raid says %d", status)
	}
	// Check it whole before the first file is written: half of it helps nobody.
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	sum, err := tree.Check(f, "", tree.Limits{})
	if err != nil {
		return err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	if err := os.MkdirAll(a.output, 0o777); err != nil {
		return err
	}
	if err := tree.Unpack(a.output, f); err != nil {
		return err
	}
	a.say("/build is in %s: %d entries, %s", a.output, sum.Entries, size(sum.Bytes))
	return nil
}

// A jobWatcher passes raid's stderr on and finds the number of the job in it. raid
// says it before the job can print anything, so the first line that fits is raid's.
type jobWatcher struct {
	w io.Writer

	mu   sync.Mutex // protects the following; not held while writing
	id   string
	line []byte // what there is of the current line, as long as there is no id
}

var jobLine = regexp.MustCompile(`^raid: (?:.*[^\w-])?job ([0-9]+)\b`)

func (j *jobWatcher) Write(p []byte) (int, error) {
	j.look(p)
	return j.w.Write(p)
}

// job returns the number, or "" as long as none was said.
func (j *jobWatcher) job() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.id
}

func (j *jobWatcher) look(p []byte) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for rest := p; j.id == "" && len(rest) > 0; {
		line, more, whole := bytes.Cut(rest, []byte("\n"))
		if len(j.line)+len(line) <= 4096 {
			j.line = append(j.line, line...)
		}
		rest = more
		if !whole {
			break
		}
		if m := jobLine.FindSubmatch(j.line); m != nil {
			j.id = string(m[1])
		}
		j.line = j.line[:0]
	}
}

// size prints a number of bytes for people.
func size(n int64) string {
	for _, u := range []struct {
		at   int64
		name string
	}{{1e9, "GB"}, {1e6, "MB"}, {1e3, "kB"}} {
		if n >= u.at {
			return fmt.Sprintf("%.1f %s", float64(n)/float64(u.at), u.name)
		}
	}
	return fmt.Sprintf("%d bytes", n)
}
