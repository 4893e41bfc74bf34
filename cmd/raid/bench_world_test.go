package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/rai-project/raid/keys"
	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/store/redistest"
)

// A server is something that ssh can talk to.
type server struct {
	login, port string
	key, known  string // files
}

// fast is the cipher that both sides are best at.
const fast = "aes128-gcm@openssh.com"

// command is ssh(1) as a student has it, against s. cipher "" leaves it to the client.
func (s server) command(cipher string, words ...string) *exec.Cmd {
	args := []string{"-F", "none", "-i", s.key, "-o", "IdentitiesOnly=yes", "-o", "UserKnownHostsFile=" + s.known,
		"-o", "GlobalKnownHostsFile=/dev/null", "-o", "HostKeyAlias=bench", "-o", "BatchMode=yes", "-p", s.port}
	if cipher != "" {
		args = append(args, "-c", cipher)
	}
	return exec.Command("ssh", append(append(args, s.login+"@127.0.0.1"), words...)...)
}

// do runs one command to its end, with its output to /dev/null, and returns what it
// said on stderr. in may be nil.
func (b *bench) do(s server, cipher string, in *os.File, words ...string) string {
	b.Helper()
	cmd := s.command(cipher, words...)
	if in != nil {
		cmd.Stdin = in
	}
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Run(); err != nil {
		b.Fatalf("ssh %s: %v\n%s", strings.Join(words, " "), err, said.String())
	}
	return said.String()
}

// A raid is one `raid serve`.
type raid struct {
	server
	state string
	pid   int
	conn  *ssh.Client // for questions that must cost little
}

// benchLimits let a job print and send more than a student may by default.
const benchLimits = "[limits]\noutput = \"4GiB\"\nupload = \"4GiB\"\nunpacked = \"8GiB\"\nartifact = \"4GiB\"\n[log]\nlevel = \"warn\"\n"

// startRaid starts `raid serve` with its own state, the keys of the first one, and
// more of raid.toml than benchLimits. It waits until it listens.
func (b *bench) startRaid(t *testing.T, name, toml string) *raid {
	t.Helper()
	r := &raid{state: filepath.Join(b.dir, name)}
	config := r.state + ".toml"
	if err := os.WriteFile(config, []byte(benchLimits+toml), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(r.state, 0o700); err != nil {
		t.Fatal(err)
	}
	b.shareKeys(t, r.state)
	r.serve(t, b.bin, config)
	r.server = server{login: "rai", port: r.port, key: filepath.Join(r.state, "admin"), known: filepath.Join(b.dir, "known_hosts")}
	r.conn = r.dial(t)
	return r
}

// shareKeys gives a state folder the host key and the admin key of all the others.
func (b *bench) shareKeys(t *testing.T, state string) {
	t.Helper()
	for _, name := range []string{"host_key", "admin"} {
		from := filepath.Join(b.dir, name)
		if _, err := ensureKey(from, "bench"); err != nil {
			t.Fatal(err)
		}
		for _, end := range []string{"", ".pub"} {
			text, err := os.ReadFile(from + end)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(state, name+end), text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	line, err := os.ReadFile(filepath.Join(b.dir, "host_key.pub"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(b.dir, "known_hosts"), append([]byte("bench "), line...), 0o600); err != nil {
		t.Fatal(err)
	}
}

// serve starts the process and reads its stderr until it listens.
func (r *raid) serve(t *testing.T, bin, config string) {
	t.Helper()
	cmd := exec.Command(filepath.Join(bin, "raid"), "serve", "--state", r.state, "--listen", "127.0.0.1:0", "--config", config)
	said, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	read := make(chan struct{})
	t.Cleanup(func() { r.stop(cmd, read) })
	r.pid = cmd.Process.Pid
	lines := bufio.NewScanner(said)
	for lines.Scan() {
		if addr, ok := strings.CutPrefix(lines.Text(), "raid: listening on "); ok {
			_, r.port, _ = net.SplitHostPort(addr)
			go func() { defer close(read); io.Copy(os.Stderr, said) }() // ends with the process
			return
		}
	}
	close(read)
	t.Fatalf("raid serve in %s does not listen", r.state)
}

// stop ends raid and its runners at once.
func (r *raid) stop(cmd *exec.Cmd, read chan struct{}) {
	if r.conn != nil {
		r.conn.Close()
	}
	cmd.Process.Signal(syscall.SIGTERM)
	again := time.AfterFunc(8*time.Second, func() { cmd.Process.Signal(syscall.SIGTERM) })
	hard := time.AfterFunc(20*time.Second, func() { cmd.Process.Kill() })
	cmd.Wait()
	again.Stop()
	hard.Stop()
	<-read
}

// dial connects a client of x/crypto, which costs less than a process.
func (s server) dial(t testing.TB) *ssh.Client {
	t.Helper()
	signer, err := keys.LoadSigner(s.key, nil)
	if err != nil {
		t.Fatal(err)
	}
	c, err := ssh.Dial("tcp", "127.0.0.1:"+s.port, &ssh.ClientConfig{User: s.login, Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)},
		HostKeyCallback: ssh.InsecureIgnoreHostKey(), Timeout: 20 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// ask runs a command over the standing connection and returns its stdout. raid closes
// one that is idle for long; then there is a new one.
func (r *raid) ask(t testing.TB, command string) []byte {
	t.Helper()
	s, err := r.conn.NewSession()
	if err != nil {
		r.conn.Close()
		r.conn = r.dial(t)
		s, err = r.conn.NewSession()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	out, err := s.Output(command)
	if err != nil {
		t.Fatalf("%s: %v", command, err)
	}
	return out
}

// status returns a job as it stands.
func (r *raid) status(t testing.TB, id int64) job.Job {
	t.Helper()
	var j job.Job
	if err := json.Unmarshal(r.ask(t, fmt.Sprintf("status %d --json", id)), &j); err != nil {
		t.Fatal(err)
	}
	return j
}

// wait returns a job once its state is one of those, asking now and then.
func (r *raid) wait(t testing.TB, id int64, until func(job.State) bool) job.Job {
	t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	deadline := time.Now().Add(2 * time.Minute)
	for range tick.C {
		if j := r.status(t, id); until(j.State) {
			return j
		}
		if time.Now().After(deadline) {
			break
		}
	}
	t.Fatalf("job %d: still %s", id, r.status(t, id).State)
	return job.Job{}
}

var jobLine = regexp.MustCompile(`(?m)^raid: job (\d+) queued`)

// jobID finds the id in what submit said.
func jobID(t testing.TB, said string) int64 {
	t.Helper()
	m := jobLine.FindStringSubmatch(said)
	if m == nil {
		t.Fatalf("no job id in %q", said)
	}
	id, _ := strconv.ParseInt(m[1], 10, 64)
	return id
}

// detach submits a command and returns its id.
func (r *raid) detach(t testing.TB, line string) int64 {
	t.Helper()
	id, err := strconv.ParseInt(strings.TrimSpace(string(r.ask(t, "submit --detach -- "+line))), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// drop removes the output of a job, so that a run does not fill the disk.
func (r *raid) drop(id int64) {
	os.RemoveAll(filepath.Join(r.state, "spool", strconv.FormatInt(id, 10)))
}

// runnerPID is the process of the local runner.
func (r *raid) runnerPID(t testing.TB) int {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(r.state, "runners", "0", "lock"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// join starts `raid runner --server` for r and returns once it takes jobs.
func (b *bench) join(r *raid) {
	b.Helper()
	out := filepath.Join(b.dir, "runner-key")
	keygen := exec.Command(filepath.Join(b.bin, "rai-keygen"), "--server", "rai@127.0.0.1:"+r.port, "-i", r.key, "--out", out, "runner", "far")
	if text, err := keygen.CombinedOutput(); err != nil {
		b.Fatalf("rai-keygen runner: %v\n%s", err, text)
	}
	known := filepath.Join(b.dir, "runner_known_hosts")
	line, err := os.ReadFile(filepath.Join(b.dir, "host_key.pub"))
	if err != nil {
		b.Fatal(err)
	}
	if err := os.WriteFile(known, fmt.Appendf(nil, "[127.0.0.1]:%s %s", r.port, line), 0o600); err != nil {
		b.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(b.bin, "raid"), "runner", "--state", filepath.Join(b.dir, "far"), "--server", "rai@127.0.0.1:"+r.port,
		"-i", filepath.Join(out, "runner-far"), "--known-hosts", known, "--config", r.state+".toml", "--name", "far")
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { cmd.Process.Signal(syscall.SIGTERM); cmd.Wait() })
	r.wait(b, r.detach(b, "true"), job.State.Final)
}

// memory is a line of /proc/PID/status, in KiB.
func memory(t testing.TB, pid int, name string) float64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, name+":"); ok {
			kib, _ := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			return kib
		}
	}
	t.Fatalf("/proc/%d/status has no %s", pid, name)
	return 0
}

// peak measures the largest resident set of a process while fn runs, in MiB, and
// what it was before.
func peak(t testing.TB, pid int, fn func()) (before, most float64) {
	t.Helper()
	before = memory(t, pid, "VmRSS") / 1024
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0); err != nil {
		t.Fatal(err)
	}
	fn()
	return before, memory(t, pid, "VmHWM") / 1024
}

// startSSHD starts the system's sshd for whoever runs this, with raid's keys.
func (b *bench) startSSHD(t *testing.T) server {
	t.Helper()
	path, err := exec.LookPath("sshd")
	if err != nil {
		path = "/usr/sbin/sshd"
	}
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	os.MkdirAll("/run/sshd", 0o755)
	s := server{login: me.Username, port: redistest.Port(t, "127.0.0.1"), key: filepath.Join(b.dir, "admin"), known: filepath.Join(b.dir, "known_hosts")}
	config := filepath.Join(b.dir, "sshd_config")
	text := fmt.Sprintf("Port %s\nListenAddress 127.0.0.1\nHostKey %s\nAuthorizedKeysFile %s\nStrictModes no\nUsePAM no\nPermitRootLogin prohibit-password\nPrintMotd no\nPidFile none\nLogLevel INFO\n",
		s.port, filepath.Join(b.dir, "host_key"), filepath.Join(b.dir, "admin.pub"))
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, "-D", "-e", "-f", config)
	said, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatalf("sshd: %v", err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	for lines := bufio.NewScanner(said); lines.Scan(); {
		if strings.HasPrefix(lines.Text(), "Server listening on") {
			go io.Copy(io.Discard, said) // ends with the server
			return s
		}
	}
	t.Fatal("sshd does not listen")
	return s
}

// A redisServer is a Redis of our own, without a disk.
type redisServer struct {
	*redistest.Server
	url string
}

func (b *bench) startRedis(t *testing.T) *redisServer {
	t.Helper()
	return b.startRedisWith(t, "--appendonly", "no")
}

func (b *bench) startRedisWith(t *testing.T, more ...string) *redisServer {
	t.Helper()
	port := redistest.Port(t, "127.0.0.1")
	dir := filepath.Join(b.dir, "redis-"+port)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	s := redistest.StartPlain(t, append([]string{"--port", port, "--bind", "127.0.0.1", "--save", "", "--dir", dir}, more...)...)
	return &redisServer{Server: s, url: "redis://127.0.0.1:" + port + "/0"}
}

const echoSource = `package main

import "os"

func main() { os.Stdout.WriteString("hi\n") }
`

// makeImage gives Docker an image that holds one static program. Nothing is pulled.
func (b *bench) makeImage(t *testing.T) (image, why string) {
	t.Helper()
	if err := exec.Command("docker", "info").Run(); err != nil {
		return "", "no Docker engine answers"
	}
	root, name := filepath.Join(b.dir, "image"), "raid-bench-echo"
	if err := os.MkdirAll(root, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(root+"/echo.go", []byte(echoSource), 0o644); err != nil {
		t.Fatal(err)
	}
	script := "cd " + root + " && CGO_ENABLED=0 go build -o echo echo.go && tar cf - echo | docker import - " + name
	if out, err := exec.Command("sh", "-c", script).CombinedOutput(); err != nil {
		return "", "docker import: " + strings.TrimSpace(string(out))
	}
	t.Cleanup(func() { exec.Command("docker", "rmi", "-f", name).Run() })
	return name, ""
}

const gib = 1 << 30

// makeBlob makes a tar with one file of 1 GiB that does not compress.
func (b *bench) makeBlob(t *testing.T) string {
	t.Helper()
	path := filepath.Join(b.dir, "blob.tar")
	script := fmt.Sprintf("cd %s && head -c %d /dev/urandom >blob && tar cf blob.tar blob && rm blob", b.dir, gib)
	if out, err := exec.Command("sh", "-c", script).CombinedOutput(); err != nil {
		t.Fatalf("make 1 GiB: %v\n%s", err, out)
	}
	return path
}
