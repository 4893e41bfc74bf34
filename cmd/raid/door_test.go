package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/rai-project/raid/sshd/store/redistest"
)

// TestScriptThroughDoor runs what people do once more where two raids serve one
// deployment, and everybody calls the one that does not lead.
func TestScriptThroughDoor(t *testing.T) {
	if testing.Short() {
		t.Skip("scripts take minutes")
	}
	need(t, "ssh", "ssh-keygen", "git", "tar", "bwrap", "redis-server")
	t.Parallel()
	bin := buildPrograms(t)
	var files []string
	for _, name := range []string{"attach", "cancel", "events", "hooks", "leave", "logs", "output", "rai", "rerun", "streams", "strangers", "tty"} {
		files = append(files, filepath.Join("testdata", "script", name+".txtar"))
	}
	testscript.Run(t, testscript.Params{
		Files:               files,
		WorkdirRoot:         sharedTemp(t),
		RequireExplicitExec: true,
		Setup: func(e *testscript.Env) error {
			if err := setUp(e, bin, nil); err != nil {
				return err
			}
			e.Values[worldKey{}].(*world).deploy()
			return nil
		},
		Condition: condition,
		Cmds:      verbs(),
	})
}

// A deployment is what makes a world's raid one of two: the other one is a door to it.
type deployment struct {
	config string // of both
	state  string // of the door
	door   *process
}

// deploy makes the world's raid one of two from its next start on.
func (w *world) deploy() {
	d := &deployment{config: filepath.Join(w.dir, "deployment.toml"), state: filepath.Join(w.dir, "door")}
	text := "[queue]\nstore = \"" + redistest.Start(w.tb).URL() + "\"\n"
	for path, more := range map[string]string{d.config: "", w.doorConfig(): "[runners]\nlocal = 0\n"} {
		if err := os.WriteFile(path, []byte(text+more), 0o644); err != nil {
			w.tb.Fatal(err)
		}
	}
	w.two = d
}

func (w *world) doorConfig() string { return filepath.Join(w.dir, "door.toml") }

var (
	itLeads     = regexp.MustCompile(`this raid leads`)
	othersLeads = regexp.MustCompile(`the raid at \S+ leads`)
)

// openDoor starts the other raid, once the first one leads, and returns where it listens.
func (w *world) openDoor(ctx context.Context) (port string, err error) {
	if _, err := w.log.await(ctx, itLeads); err != nil {
		return "", err
	}
	if err := os.MkdirAll(w.two.state, 0o700); err != nil {
		return "", err
	}
	for _, name := range []string{"host_key", "host_key.pub", "admin", "admin.pub"} {
		b, err := os.ReadFile(filepath.Join(w.state, name))
		if err != nil {
			return "", err
		}
		if err := os.WriteFile(filepath.Join(w.two.state, name), bytes.Clone(b), 0o600); err != nil {
			return "", err
		}
	}
	w.two.door, err = w.start([]string{filepath.Join(w.bin, "raid"), "serve", "--listen", "127.0.0.1:0",
		"--state", w.two.state, "--config", w.doorConfig()}, os.Environ(), "", 0)
	if err != nil {
		return "", err
	}
	if _, err := w.two.door.both.await(ctx, othersLeads); err != nil {
		return "", err
	}
	m, err := w.two.door.both.await(ctx, listening)
	if err != nil {
		return "", err
	}
	return m[1], nil
}

// closeDoor ends it, as staff would.
func (w *world) closeDoor() {
	if w.two == nil || w.two.door == nil {
		return
	}
	w.two.door.retire()
	if w.two.door.status != 0 {
		w.tb.Errorf("the other raid ended with status %d:\n%s", w.two.door.status, lastLines(w.two.door.both.String(), 30))
	}
	w.two.door = nil
}
