package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/charmbracelet/log"
	"github.com/pelletier/go-toml/v2"

	"github.com/rai-project/raid/cmd/internal/cli"
	"github.com/rai-project/raid/keys"
	"github.com/rai-project/raid/keys/secret"
	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd"
	"github.com/rai-project/raid/sshd/queue"
	"github.com/rai-project/raid/sshd/stream"
)

// A config is raid.toml. Every field is optional; what is not there has the value of
// defaults. An unknown key is an error with its line, so that a typo cannot become a
// default.
type config struct {
	Listen  string                `toml:"listen"`
	State   string                `toml:"state"`
	Auth    authConfig            `toml:"auth"`
	Queue   queueConfig           `toml:"queue"`
	Mirror  mirrorConfig          `toml:"mirror"`
	Runners runnersConfig         `toml:"runners"`
	Box     boxConfig             `toml:"box"`
	Limits  limitsConfig          `toml:"limits"`
	Roles   map[string]roleConfig `toml:"roles"`
	Pools   map[string]poolConfig `toml:"pools"`
	Log     logConfig             `toml:"log"`
}

type authConfig struct {
	Guests bool `toml:"guests"` // unknown keys may look around
}

type queueConfig struct {
	Store   string           `toml:"store"`   // "sqlite"
	Burst   duration         `toml:"burst"`   // GPU time of credit for a team that comes back
	Express duration         `toml:"express"` // time limit of the jobs that express slots take; 0: none
	User    capsConfig       `toml:"user"`    // of every user
	Team    capsConfig       `toml:"team"`    // of every team
	Weights map[string]int64 `toml:"weights"` // share of a team, 1 to 1000
}

// capsConfig bounds what somebody has at once; 0 is no bound.
type capsConfig struct {
	Running int `toml:"running"`
	Queued  int `toml:"queued"`
	Daily   int `toml:"daily"`
}

type mirrorConfig struct {
	Redis  string   `toml:"redis"`   // redis://…, "" for none
	PerJob size     `toml:"per_job"` // bytes of one job's output kept in Redis
	Keep   duration `toml:"keep"`    // how long after the last write
}

type runnersConfig struct {
	Local   any      `toml:"local"`   // "auto", or how many
	Orphan  duration `toml:"orphan"`  // how long a job runs without a word from raid
	Express int      `toml:"express"` // how many of the local ones take short jobs only
}

type boxConfig struct {
	Engine string            `toml:"engine"` // "auto" or "bwrap"
	Images map[string]string `toml:"images"` // image name → root folder
	Warm   int               `toml:"warm"`   // 0 or 1
}

type limitsConfig struct {
	Time     duration `toml:"time"`
	Memory   size     `toml:"memory"`
	CPUs     float64  `toml:"cpus"`
	Pids     int      `toml:"pids"`
	Output   size     `toml:"output"`
	Disk     size     `toml:"disk"`
	Artifact size     `toml:"artifact"`
	Upload   size     `toml:"upload"`
	Unpacked size     `toml:"unpacked"`
	Entries  int      `toml:"entries"`
	Reserve  share    `toml:"reserve"`
}

// A roleConfig replaces limits for one role; what it leaves out stays.
type roleConfig struct {
	Time    *duration `toml:"time"`
	Memory  *size     `toml:"memory"`
	Output  *size     `toml:"output"`
	Disk    *size     `toml:"disk"`
	Upload  *size     `toml:"upload"`
	GPUs    int       `toml:"gpus"`
	Network bool      `toml:"network"`
}

// A poolConfig makes a pool known. The first of them by name is the default, unless
// rai_<arch> is among them.
type poolConfig struct{}

type logConfig struct {
	Level string `toml:"level"` // debug, info, warn, error
}

func defaults() config {
	return config{
		Listen:  ":2222",
		State:   "/var/lib/raid",
		Auth:    authConfig{Guests: true},
		Queue:   queueConfig{Store: "sqlite", Burst: duration(time.Minute)},
		Mirror:  mirrorConfig{PerJob: 1 << 20, Keep: duration(time.Hour)},
		Runners: runnersConfig{Local: "auto", Orphan: duration(30 * time.Minute)},
		Box:     boxConfig{Engine: "auto", Warm: 1},
		Limits: limitsConfig{Time: duration(time.Hour), Memory: 16 << 30, Pids: 4096, Output: 64 << 20, Disk: 10 << 30,
			Artifact: 1 << 30, Upload: 1 << 30, Unpacked: 10 << 30, Entries: 100_000, Reserve: 0.05},
		Log: logConfig{Level: "info"},
	}
}

// readConfig reads raid.toml; "" is all defaults.
func readConfig(path string) (config, error) {
	c := defaults()
	if path == "" {
		return c, c.check()
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return c, err
	}
	d := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields()
	if err := d.Decode(&c); err != nil {
		return c, explainTOML(path, err)
	}
	if err := c.check(); err != nil {
		return c, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// explainTOML shows the line and the place in it.
func explainTOML(path string, err error) error {
	var unknown *toml.StrictMissingError
	if errors.As(err, &unknown) {
		return fmt.Errorf("%s: unknown key\n%s", path, unknown.String())
	}
	var bad *toml.DecodeError
	if errors.As(err, &bad) {
		return fmt.Errorf("%s: %w\n%s", path, bad, bad.String())
	}
	return fmt.Errorf("%s: %w", path, err)
}

func (c *config) check() error {
	if c.Queue.Store != "sqlite" {
		return fmt.Errorf("[queue] store = %q: this raid knows \"sqlite\"", c.Queue.Store)
	}
	if c.Box.Engine != "auto" && c.Box.Engine != "bwrap" {
		return fmt.Errorf("[box] engine = %q: this raid knows \"auto\" and \"bwrap\"", c.Box.Engine)
	}
	if c.Box.Warm < 0 || c.Box.Warm > 1 {
		return fmt.Errorf("[box] warm = %d: it is 0 or 1", c.Box.Warm)
	}
	if c.Runners.Express > 0 && c.Queue.Express == 0 {
		return errors.New("[runners] express needs [queue] express, the time limit of short jobs")
	}
	for team, w := range c.Queue.Weights {
		if w < 1 || w > 1000 {
			return fmt.Errorf("[queue.weights] %s = %d: it is 1 to 1000", team, w)
		}
	}
	if err := c.Limits.check(); err != nil {
		return err
	}
	if _, err := c.local(0); err != nil {
		return err
	}
	for name, r := range c.Roles {
		if !slices.Contains([]keys.Role{keys.Student, keys.Power, keys.Staff, keys.Admin}, keys.Role(name)) {
			return fmt.Errorf("[roles.%s]: the roles are student, power, staff and admin", name)
		}
		if r.Time != nil && *r.Time <= 0 {
			return fmt.Errorf("[roles.%s] time must be positive", name)
		}
		if r.GPUs < 0 {
			return fmt.Errorf("[roles.%s] gpus = %d: it is a number from 0, and 0 means as many as a slot has", name, r.GPUs)
		}
	}
	if _, err := log.ParseLevel(c.Log.Level); err != nil {
		return fmt.Errorf("[log] level = %q: it is debug, info, warn or error", c.Log.Level)
	}
	for name := range c.Pools {
		if name == "" || strings.ContainsAny(name, " /") {
			return fmt.Errorf("[pools.%q]: a name has no spaces and slashes", name)
		}
	}
	return nil
}

func (l *limitsConfig) check() error {
	switch {
	case l.Time <= 0:
		return errors.New("[limits] time must be positive")
	case l.CPUs < 0:
		return fmt.Errorf("[limits] cpus = %v: it is a number from 0, and 0 means all", l.CPUs)
	case l.Pids < 0:
		return fmt.Errorf("[limits] pids = %d: it is a number from 0, and 0 means no limit", l.Pids)
	case l.Entries < 0:
		return fmt.Errorf("[limits] entries = %d: it is a number from 0, and 0 means no limit", l.Entries)
	}
	return nil
}

// policy is what the queue goes by.
func (c *config) policy() queue.Policy {
	p := queue.DefaultPolicy()
	p.Burst, p.Express = time.Duration(c.Queue.Burst).Milliseconds(), time.Duration(c.Queue.Express).Milliseconds()
	p.User, p.Team, p.Weights = queue.Caps(c.Queue.User), queue.Caps(c.Queue.Team), c.Queue.Weights
	return p
}

// local returns how many local runners there are to be on a machine with so many
// GPUs: with "auto" one for each, else one.
func (c *config) local(gpus int) (int, error) {
	switch v := c.Runners.Local.(type) {
	case string:
		if v == "auto" {
			return max(1, gpus), nil
		}
	case int64:
		if v >= 0 && v <= 1024 {
			return int(v), nil
		}
	}
	return 0, fmt.Errorf("[runners] local = %v: it is \"auto\" or a number", c.Runners.Local)
}

// pools returns the pools, the default one first.
func (c *config) pools(arch string) []string {
	def := "rai_" + arch
	var all []string
	for name := range c.Pools {
		all = append(all, name)
	}
	slices.Sort(all)
	if len(all) == 0 {
		return []string{def}
	}
	if i := slices.Index(all, def); i > 0 {
		all = append([]string{def}, slices.Delete(all, i, i+1)...)
	}
	return all
}

// limits returns the limits of every role.
func (c *config) limits() map[keys.Role]sshd.Limits {
	l := &c.Limits
	base := sshd.Limits{
		Limits: job.Limits{Time: time.Duration(l.Time), Memory: int64(l.Memory), CPUs: l.CPUs, Pids: l.Pids,
			Output: int64(l.Output), Disk: int64(l.Disk), Artifact: int64(l.Artifact)},
		Upload: int64(l.Upload), Unpacked: int64(l.Unpacked), Entries: l.Entries,
	}
	all := map[keys.Role]sshd.Limits{keys.Student: base}
	for name, r := range c.Roles {
		m := base
		if r.Time != nil {
			m.Time = time.Duration(*r.Time)
		}
		set(&m.Memory, r.Memory)
		set(&m.Output, r.Output)
		set(&m.Disk, r.Disk)
		set(&m.Upload, r.Upload)
		m.GPUs, m.Network = r.GPUs, r.Network
		all[keys.Role(name)] = m
	}
	return all
}

func set(to *int64, v *size) {
	if v != nil {
		*to = int64(*v)
	}
}

// reveal decrypts the values that may be secrets, with the host key in dir.
func (c *config) reveal(dir string) error {
	if !secret.Is(c.Mirror.Redis) {
		return nil
	}
	private, err := os.ReadFile(filepath.Join(dir, "host_key"))
	if err != nil {
		return err
	}
	if c.Mirror.Redis, err = secret.Decrypt(c.Mirror.Redis, private); err != nil {
		return cli.Hintf(fmt.Errorf("[mirror] redis: %w", err), "encrypt it to this raid's key: rai-crypto encrypt -r %s", filepath.Join(dir, "host_key.pub"))
	}
	return nil
}

// mirror returns the mirror's options, nil for none.
func (c *config) mirror(logf func(string, ...any)) *stream.MirrorOptions {
	if c.Mirror.Redis == "" {
		return nil
	}
	return &stream.MirrorOptions{URL: c.Mirror.Redis, PerJob: int64(c.Mirror.PerJob), Keep: time.Duration(c.Mirror.Keep), Logf: logf}
}

// The texts of raid.toml: "10GiB", "30m", "5%".

type size int64

func (s *size) UnmarshalText(b []byte) error {
	n, err := job.ParseSize(string(b))
	*s = size(n)
	return err
}

type duration time.Duration

func (d *duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err == nil && v < 0 {
		err = fmt.Errorf("%q is negative", b)
	}
	*d = duration(v)
	return err
}

type share float64

func (s *share) UnmarshalText(b []byte) error {
	n, err := strconv.ParseFloat(strings.TrimSuffix(string(b), "%"), 64)
	if err != nil || !strings.HasSuffix(string(b), "%") || n < 0 || n > 90 {
		return fmt.Errorf("%q: it looks like \"5%%\", at most 90%%", b)
	}
	*s = share(n / 100)
	return nil
}

// absolute makes a path that still means the same in another folder.
func absolute(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	return filepath.Abs(path)
}
