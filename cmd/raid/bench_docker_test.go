package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/rai-project/raid/runner/box"
	"github.com/rai-project/raid/runner/box/boxtest"
	"github.com/rai-project/raid/runner/box/docker"
	"github.com/rai-project/raid/runner/job"
)

// dockerRounds is enough for a p99 that is not just the first round's.
const dockerRounds = 25

// benchDocker measures containers beside docker run of the same image: the box alone, and
// a whole job beside what somebody with an account on the machine would type.
func benchDocker(b *bench) {
	image, why := b.makeRoot()
	if why != "" {
		b.skipRow("boxes in Docker containers", why)
		return
	}
	b.rows = append(b.rows, row{what: "boxes in Docker containers: " + dockerInfo()})
	b.dockerBox(image)
	b.dockerEcho(image)
}

// dockerInfo says what the numbers of containers depend on most.
func dockerInfo() string {
	return firstLine("docker", "info", "-f", "engine {{.ServerVersion}}, file-system driver {{.Driver}}, cgroup v{{.CgroupVersion}}")
}

// makeRoot gives Docker an image with a shell. Nothing is pulled.
func (b *bench) makeRoot() (image, why string) {
	b.Helper()
	if err := exec.Command("docker", "info").Run(); err != nil {
		return "", "no Docker engine answers"
	}
	r, w := io.Pipe()
	go func() { w.CloseWithError(boxtest.WriteRoot(w)) }() // ends with the import
	defer r.Close()
	const name = "raid-bench-root:latest"
	cmd := exec.Command("docker", "import", "-", name)
	cmd.Stdin = r
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", "docker import: " + strings.TrimSpace(string(out))
	}
	b.Cleanup(func() { exec.Command("docker", "rmi", "-f", name).Run() })
	return name, ""
}

// dockerBox is the box alone: from the order to the first byte where it waits, and from
// nothing to the first byte where it does not.
func (b *bench) dockerBox(image string) {
	e, err := docker.New(context.Background(), docker.Config{ID: "bench-" + strconv.Itoa(os.Getpid()), Exe: filepath.Join(b.bin, "raid"),
		Args: []string{"shim"}, Images: job.Images{Default: image}})
	if err != nil {
		b.Fatal(err)
	}
	defer e.Close()
	n := 0
	next := func() box.Config {
		n++
		return box.Config{ID: fmt.Sprintf("b%d", n), Limits: job.Limits{Memory: 1 << 30, CPUs: 2, Pids: 4096, Disk: 1 << 30}}
	}
	s := b.race(dockerRounds,
		contestant{"warm box", func() float64 { return orderToByte(b, b.readyBox(e, next())) }},
		contestant{"cold box", func() float64 {
			var x *openBox
			ready := timed(func() { x = b.readyBox(e, next()) })
			return ready + orderToByte(b, x)
		}},
		contestant{"docker run", func() float64 { return b.dockerFirstByte(image, shellHi...) }},
		contestant{"docker run --network none", func() float64 { return b.dockerFirstByte("--network", append([]string{"none", image}, shellHi...)...) }})
	b.tail("start of a warm container: first byte", s["warm box"], s["docker run"], "docker run", 0.03)
	b.number("the same, alone", s["warm box"].p99("ms"), "p50 ≤ 5 ms", s["warm box"].median() <= 5)
	b.tail("the same, container started cold", s["cold box"], s["docker run"], "docker run", 0)
	b.tail("the same, cold, against a container without a network", s["cold box"], s["docker run --network none"], "docker run --network none", 0)
}

// An openBox waits for its order.
type openBox struct {
	box.Box
	frames *job.FrameReader
}

func (b *bench) readyBox(e box.Engine, c box.Config) *openBox {
	b.Helper()
	x, err := e.Start(context.Background(), c)
	if err != nil {
		b.Fatal(err)
	}
	frames := job.NewFrameReader(x.Stdout())
	if k, _, err := frames.Next(); k != job.Ready || err != nil {
		b.Fatalf("first frame %q, %v", byte(k), err)
	}
	return &openBox{x, frames}
}

// shellHi is what an image with a shell runs.
var shellHi = []string{"bash", "-c", "echo hi"}

// dockerFirstByte takes what docker run does and returns when the first byte came, in ms.
func (b *bench) dockerFirstByte(first string, more ...string) float64 {
	b.Helper()
	cmd := exec.Command("docker", append([]string{"run", "--rm", first}, more...)...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	defer cmd.Wait()
	return timed(func() {
		if err := cmd.Start(); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(out, make([]byte, 1)); err != nil {
			b.Fatal(err)
		}
	})
}

// dockerEcho is a job from submit to exit. The next warm box is waited for between turns:
// it would be made at the cost of whoever comes next.
func (b *bench) dockerEcho(image string) {
	toml := fmt.Sprintf("[box]\nengine = \"docker\"\nimage = %q\npull = \"never\"\n", image)
	warm, cold := b.startRaid(b.T, "docker", toml), b.startRaid(b.T, "docker-cold", toml+"warm = 0\n")
	for _, r := range []*raid{warm, cold} {
		r.wait(b, r.detach(b, "true"), job.State.Final)
	}
	b.awaitBox(warm)
	s := b.race(dockerRounds,
		contestant{"warm", func() float64 {
			defer b.awaitBox(warm)
			return timed(func() { b.do(warm.server, fast, nil, "submit -- echo hi") })
		}},
		contestant{"cold", func() float64 { return timed(func() { b.do(cold.server, fast, nil, "submit -- echo hi") }) }},
		contestant{"docker", func() float64 {
			return timed(func() { b.do(b.peer, fast, nil, "docker run --rm "+image+" bash -c 'echo hi'") })
		}})
	b.tail("submit → exit of echo, warm container", s["warm"], s["docker"], "ssh docker run", 0.08)
	b.tail("the same, container started cold", s["cold"], s["docker"], "ssh docker run", 0)
}

// awaitBox waits until a raid's one runner has a container that runs.
func (b *bench) awaitBox(r *raid) {
	b.Helper()
	id, err := os.ReadFile(filepath.Join(r.state, "runners", "0", "id"))
	if err != nil {
		b.Fatal(err)
	}
	label := "label=raid.runner=" + strings.TrimSpace(string(id))
	ctx, cancel := context.WithTimeout(b.Context(), time.Minute)
	defer cancel()
	// What starts between the two commands is told by the first, which begins earlier.
	events := exec.CommandContext(ctx, "docker", "events", "--since", strconv.FormatInt(time.Now().Unix(), 10), "--filter", label, "--filter", "event=start")
	out, err := events.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := events.Start(); err != nil {
		b.Fatal(err)
	}
	defer func() { cancel(); events.Wait() }()
	for lines := bufio.NewScanner(out); firstLine("docker", "ps", "-q", "--filter", label) == ""; {
		if !lines.Scan() {
			b.Fatal("no container waits")
		}
	}
}

// p99 prints the median and the worst of a hundred.
func (s sample) p99(unit string) string {
	return fmt.Sprintf("p50 %s, p99 %s %s", number(s.median()), number(s.quantile(0.99)), unit)
}

// tail adds a row of medians and 99th percentiles; a goal of 0 is none.
func (b *bench) tail(what string, ours, peer sample, peerName string, goal float64) {
	b.versus(what, ours, peer, peerName, goal)
	last := &b.rows[len(b.rows)-1]
	last.ours, last.peer = ours.p99("ms"), peerName+": "+peer.p99("ms")
}
