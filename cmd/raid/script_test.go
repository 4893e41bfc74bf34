package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/rai-project/raid/runner/box/docker/dockertest"
)

// TestScript runs the scripts of testdata/script against the real programs, with real
// ssh, git and redis. Each has a raid, a state folder and a port of its own, and each
// ends with a look around: nothing of that raid may be left on the machine. With
// RAID_UPDATE=1 the expected outputs that cmp compares are written anew.
//
// Beside testscript's own, these are the verbs. "<FILE" before or among the words of a
// command is its stdin, "<-" an open pipe; "&name&" at the end puts it in the background.
//
//	raid start [-config FILE] [-uid N] | stop | kill9 | restart | log
//	enrol NAME [TEAM [ROLE]]       a person, with keys/NAME
//	key NAME                       a key that nobody enrolled
//	as NAME [FLAG… --] WORD…       ssh with that key; it has to succeed
//	status N VERB WORD…            the same, or a program, and its exact exit status
//	until NAME|log|boxes REGEXP    wait for a line of a background command, of raid's log, or
//	                               of the images in which boxes were started since the verb boxes
//	finish NAME N                  wait for the end of a background command, with status N
//	signal SIG NAME|raid           kill -SIG a background command
//	type NAME TEXT, eof NAME       write to a pipe, close it
//	runner kill9 N                 kill -9 a local runner
//	runner start NAME [-config FILE]
//	                               a runner of another machine, with NAME as its state, in
//	                               the background as &NAME&; enrolled when it is new
//	proxy NAME                     NAME, a person or a runner, comes through a proxy, which
//	                               finds raid again on another port
//	cut NAME, mend NAME            the proxy falls silent, and goes on where it was
//	mktar FILE ENTRY…              a tar as no tar(1) would make it; see mktar
//	events FILE KIND…              --json output: all kinds there, every line well-formed
//	same TEXT FILE…                the SHA-256 of the files is TEXT
//	registry start [USER PASSWORD] | stop, registry push REPOSITORY:TAG WORD
//	                               an image registry at $REGISTRY; boxes in the image find VERSION=WORD
//	redis port | start [-appendonly] | kill9 | hang | go
//	s3 start | refuse | hang | work
//	                               an S3 server with a bucket, as $S3; or without key and secret,
//	                               $S3_BARE, $S3_KEY and $S3_SECRET
//	s3 objects | age | tamper      names of all blobs; make them two hours old; give them other bytes
//	get STATUS URL|- [RANGE]       http.body and http.header of a URL, or of the one just printed
//	mirrored JOB [STATE]           what the mirror says: mirror.out, mirror.err, mirror.end; with
//	                               a STATE its events tell of that, too
func TestScript(t *testing.T) {
	if testing.Short() {
		t.Skip("scripts take minutes")
	}
	need(t, "ssh", "ssh-keygen", "git", "tar", "bwrap", "redis-server")
	t.Parallel()
	bin := buildPrograms(t)
	root := sharedTemp(t)
	lab, noLab := dockertest.Open()
	if lab != nil {
		t.Cleanup(func() {
			if err := lab.Close(); err != nil {
				t.Errorf("close the Docker lab: %v", err)
			}
		})
	}
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		WorkdirRoot:         root,
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		UpdateScripts:       os.Getenv("RAID_UPDATE") != "",
		Setup:               func(e *testscript.Env) error { return setUp(e, bin, lab) },
		Condition: func(cond string) (bool, error) {
			if cond == "docker" {
				return noLab == nil, unlessSkipping(noLab)
			}
			return condition(cond)
		},
		Cmds: verbs(),
	})
}

// TestMain lets more scripts run at once than there are cores: most of them wait most
// of the time.
func TestMain(m *testing.M) {
	flag.Parse()
	given := false
	flag.Visit(func(f *flag.Flag) { given = given || f.Name == "test.parallel" })
	if !given {
		if err := flag.Set("test.parallel", "8"); err != nil {
			panic(err)
		}
	}
	m.Run()
}

// need skips the test when a program is missing, or fails it where skipping is not
// allowed.
func need(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err == nil {
			continue
		}
		if os.Getenv("RAID_CI") != "" {
			t.Fatalf("%s is not installed", p)
		}
		t.Skipf("%s is not installed", p)
	}
}

// sharedTemp makes a folder that other users may pass: some scripts run as one.
func sharedTemp(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "raid-script")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("remove the scripts' folders: %v", err)
		}
	})
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// buildPrograms builds what the scripts run, as the Makefile does.
func buildPrograms(t *testing.T) string {
	t.Helper()
	dir := sharedTemp(t)
	cmd := exec.Command("go", "build", "-o", dir+"/", "github.com/rai-project/raid/cmd/...")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-trimpath -buildvcs=false")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return dir
}

// setUp gives a script its world and has it checked at the end.
func setUp(e *testscript.Env, bin string, lab *dockertest.Lab) error {
	tb, ok := e.T().(testing.TB)
	if !ok {
		return errors.New("testscript no longer hands out the test")
	}
	w := newWorld(tb, e.WorkDir, bin)
	e.Values[worldKey{}] = w
	e.Setenv("PATH", bin+":"+os.Getenv("PATH")+":/usr/sbin:/sbin")
	e.Setenv("HOME", filepath.Join(e.WorkDir, "home"))
	e.Setenv("SSH_CONFIG", w.sshConfig())
	e.Setenv("REPO", repoRoot())
	e.Setenv("CASES", os.Getenv("RAID_CASES"))
	if w.lab = lab; lab != nil {
		e.Setenv("DOCKER_HOST", lab.Host)
		e.Setenv("IMAGE", lab.Image)
	}
	for _, dir := range []string{"home", "keys"} {
		if err := os.Mkdir(filepath.Join(e.WorkDir, dir), 0o755); err != nil {
			return err
		}
	}
	if err := os.Chmod(e.WorkDir, 0o755); err != nil {
		return err
	}
	e.Defer(w.end)
	return os.WriteFile(w.sshConfig(), fmt.Appendf(nil, sshConfig, filepath.Join(e.WorkDir, "known_hosts")), 0o644)
}

// sshConfig is all of ssh's configuration: nothing of the machine's or the user's own
// may decide what a script shows.
const sshConfig = `Host *
	HostName 127.0.0.1
	HostKeyAlias raid
	User rai
	IdentitiesOnly yes
	IdentityAgent none
	UserKnownHostsFile %s
	GlobalKnownHostsFile none
	StrictHostKeyChecking yes
	PasswordAuthentication no
	KbdInteractiveAuthentication no
	EscapeChar none
	LogLevel ERROR
`

func repoRoot() string {
	dir, err := filepath.Abs("../..")
	if err != nil {
		panic(err)
	}
	return dir
}

// unlessSkipping returns why something is missing where no test may be skipped for it.
func unlessSkipping(missing error) error {
	if os.Getenv("RAID_CI") != "" {
		return missing
	}
	return nil
}

// condition answers [root], [cases] and [lacks:PROGRAM]; where skipping is not allowed
// a lack is an error. [docker] is answered by TestScript.
func condition(cond string) (bool, error) {
	name, program, _ := strings.Cut(cond, ":")
	switch name {
	case "root":
		return os.Geteuid() == 0, nil
	case "cases":
		return os.Getenv("RAID_CASES") != "", nil
	case "lacks":
		_, err := exec.LookPath(program)
		return err != nil, unlessSkipping(err)
	}
	return false, fmt.Errorf("unknown condition %q", cond)
}

type worldKey struct{}

// verbs binds every verb to the world of the script that uses it.
func verbs() map[string]func(*testscript.TestScript, bool, []string) {
	all := map[string]func(*testscript.TestScript, bool, []string){}
	for name, verb := range map[string]func(*world, *testscript.TestScript, []string){
		"raid": (*world).cmdRaid, "enrol": (*world).cmdEnrol, "key": (*world).cmdKey, "as": (*world).cmdAs,
		"status": (*world).cmdStatus, "until": (*world).cmdUntil, "finish": (*world).cmdFinish,
		"signal": (*world).cmdSignal, "type": (*world).cmdType, "eof": (*world).cmdEOF, "runner": (*world).cmdRunner,
		"proxy": (*world).cmdProxy, "cut": (*world).cmdCut, "mend": (*world).cmdMend, "mktar": (*world).cmdMktar, "events": (*world).cmdEvents,
		"same": (*world).cmdSame, "redis": (*world).cmdRedis, "registry": (*world).cmdRegistry, "boxes": (*world).cmdBoxes, "mirrored": (*world).cmdMirrored,
		"s3": (*world).cmdS3, "get": (*world).cmdGet,
	} {
		all[name] = func(ts *testscript.TestScript, neg bool, args []string) {
			if neg {
				ts.Fatalf("! %s: say which status: status N %s …", name, name)
			}
			verb(ts.Value(worldKey{}).(*world), ts, args)
		}
	}
	return all
}

// within bounds every wait of the scripts. It is a guard, not a measure.
func (w *world) within(ts *testscript.TestScript, what string, wait func(context.Context) error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := wait(ctx); err != nil {
		ts.Fatalf("%s: %v", what, err)
	}
}

// words takes redirections and the background's name out of a command.
func words(ts *testscript.TestScript, args []string) (rest []string, stdin, name string) {
	for i, a := range args {
		switch {
		case strings.HasPrefix(a, "<") && len(a) > 1:
			stdin = a[1:]
		case i == len(args)-1 && len(a) > 2 && a[0] == '&' && a[len(a)-1] == '&':
			name = a[1 : len(a)-1]
		default:
			rest = append(rest, a)
		}
	}
	if len(rest) == 0 {
		ts.Fatalf("a command is missing")
	}
	return rest, stdin, name
}
