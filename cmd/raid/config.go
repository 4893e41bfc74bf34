package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"net"
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
	Listen     string                    `toml:"listen"`
	State      string                    `toml:"state"`
	Auth       authConfig                `toml:"auth"`
	Queue      queueConfig               `toml:"queue"`
	Mirror     mirrorConfig              `toml:"mirror"`
	Blobs      blobsConfig               `toml:"blobs"`
	Runners    runnersConfig             `toml:"runners"`
	Box        boxConfig                 `toml:"box"`
	Registries map[string]registryConfig `toml:"registries"`
	Limits     limitsConfig              `toml:"limits"`
	Roles      map[string]roleConfig     `toml:"roles"`
	Pools      map[string]poolConfig     `toml:"pools"`
	HTTP       httpConfig                `toml:"http"`
	Log        logConfig                 `toml:"log"`
}

type authConfig struct {
	Guests bool `toml:"guests"` // unknown keys may look around
}

type queueConfig struct {
	Store     string           `toml:"store"`     // "sqlite", or a URL: see store.RedisOptions
	Advertise string           `toml:"advertise"` // where the other raids reach this one, host:port
	Burst     duration         `toml:"burst"`     // GPU time of credit for a team that comes back
	Express   duration         `toml:"express"`   // time limit of the jobs that express slots take; 0: none
	User      capsConfig       `toml:"user"`      // of every user
	Team      capsConfig       `toml:"team"`      // of every team
	Weights   map[string]int64 `toml:"weights"`   // share of a team, 1 to 1000
	Keep      duration         `toml:"keep"`      // how long the record of a job is kept; 0: for ever
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
	Memory size     `toml:"memory"`  // bytes of Redis that all jobs may take; 0: a quarter of its maxmemory
	Keep   duration `toml:"keep"`    // how long after the last write
}

type blobsConfig struct {
	URL    string   `toml:"url"`    // "": the folder blobs in state; file:///path, s3://bucket?endpoint=…
	Key    string   `toml:"key"`    // of the bucket, unless it is in url or in the environment
	Secret string   `toml:"secret"` // the same
	Keep   duration `toml:"keep"`   // how long the files of a job are kept; 0: for ever
}

type runnersConfig struct {
	Local   any      `toml:"local"`   // "auto", or how many
	Orphan  duration `toml:"orphan"`  // how long a job runs without a word from raid
	Express int      `toml:"express"` // how many of the local ones take short jobs only
	PerSlot int      `toml:"gpus_per_slot"`
	Check   duration `toml:"gpu_check"` // how long a sick GPU is left alone before it is looked at again
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
	Build   bool      `toml:"build_image"`
	Push    bool      `toml:"push"`
	Images  []string  `toml:"images"` // globs of images it may name beside those of the pool
}

// A poolConfig makes a pool known. The first of them by name is the default, unless
// rai_<arch> is among them.
type poolConfig struct {
	Data  string   `toml:"data"`       // a folder of the runner's machine, read-only at /data
	Cache size     `toml:"cache"`      // bytes that each team may keep on each runner, at /cache; 0: none
	Keep  duration `toml:"cache_keep"` // how long a cache that nobody uses is kept; 0: 30 days

	// What replaces that of [box]; nil or "": nothing.
	Engine string   `toml:"engine"`
	Image  *string  `toml:"image"`
	Allow  []string `toml:"allow"`
	Strict *bool    `toml:"strict"`
	Caps   []string `toml:"caps"`

	StrictArch bool `toml:"strict_arch"` // a build file's gpu.architecture is no wish
	KeepGoing  bool `toml:"keep_going"`  // later steps run after one failed
}

type logConfig struct {
	Level string `toml:"level"` // debug, info, warn, error
}

func defaults() config {
	return config{
		Listen:  ":2222",
		State:   "/var/lib/raid",
		Auth:    authConfig{Guests: true},
		Queue:   queueConfig{Store: "sqlite", Burst: duration(time.Minute), Keep: duration(365 * 24 * time.Hour), User: capsConfig{Queued: 1000}},
		Mirror:  mirrorConfig{PerJob: 1 << 20, Memory: 256 << 20, Keep: duration(time.Hour)},
		Blobs:   blobsConfig{Keep: duration(30 * 24 * time.Hour)},
		Runners: runnersConfig{Local: "auto", Orphan: duration(30 * time.Minute), PerSlot: 1, Check: duration(time.Minute)},
		Box:     boxConfig{Engine: "auto", Allow: []string{}, Caps: []string{}, Warm: 1, Pull: "refresh", Refresh: duration(time.Hour), Registries: []string{}},
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
	if err := c.Queue.check(); err != nil {
		return err
	}
	if err := c.Box.check(); err != nil {
		return fmt.Errorf("[box] %w", err)
	}
	if err := c.Box.checkNamed(); err != nil && len(c.Pools) == 0 {
		return fmt.Errorf("[box] %w", err)
	}
	if err := checkRegistries(c.Registries); err != nil {
		return err
	}
	if c.Runners.PerSlot < 1 || c.Runners.PerSlot > 64 {
		return fmt.Errorf("[runners] gpus_per_slot = %d: it is 1 to 64", c.Runners.PerSlot)
	}
	if c.Runners.Check <= 0 {
		return errors.New("[runners] gpu_check must be positive")
	}
	if c.Runners.Express > 0 && c.Queue.Express == 0 {
		return errors.New("[runners] express needs [queue] express, the time limit of short jobs")
	}
	for team, w := range c.Queue.Weights {
		if w < 1 || w > 1000 {
			return fmt.Errorf("[queue.weights] %s = %d: it is 1 to 1000", team, w)
		}
	}
	if err := errors.Join(c.Limits.check(), c.Blobs.check(), c.HTTP.check()); err != nil {
		return err
	}
	if c.Mirror.PerJob < leastMirror {
		return fmt.Errorf("[mirror] per_job = %d: it is at least %d", c.Mirror.PerJob, leastMirror)
	}
	if _, err := c.local(0); err != nil {
		return err
	}
	if err := c.checkRoles(); err != nil {
		return err
	}
	if _, err := log.ParseLevel(c.Log.Level); err != nil {
		return fmt.Errorf("[log] level = %q: it is debug, info, warn or error", c.Log.Level)
	}
	return c.checkPools()
}

func (q *queueConfig) check() error {
	if _, _, err := net.SplitHostPort(q.Advertise); q.Advertise != "" && err != nil {
		return fmt.Errorf("[queue] advertise = %q: it is host:port, as the other raids reach this one", q.Advertise)
	}
	return q.checkStore()
}

func (c *config) checkRoles() error {
	for name, r := range c.Roles {
		if !slices.Contains([]keys.Role{keys.Student, keys.Power, keys.Staff, keys.Admin}, keys.Role(name)) {
			return fmt.Errorf("[roles.%s]: the roles are student, power, staff and admin", name)
		}
		if r.Time != nil && *r.Time <= 0 {
			return fmt.Errorf("[roles.%s] time must be positive", name)
		}
		if r.Push && !r.Build {
			return fmt.Errorf("[roles.%s] push needs build_image = true", name)
		}
		if err := checkGlobs(r.Images); err != nil {
			return fmt.Errorf("[roles.%s] images %w", name, err)
		}
		if r.GPUs < 0 {
			return fmt.Errorf("[roles.%s] gpus = %d: it is a number from 0, and 0 means as many as a slot has", name, r.GPUs)
		}
	}
	return nil
}

func (c *config) checkPools() error {
	for name := range c.Pools {
		if name == "" || strings.ContainsAny(name, " /") {
			return fmt.Errorf("[pools.%q]: a name has no spaces and slashes", name)
		}
		p := c.Pools[name]
		b := p.box(c.Box)
		if p.Data != "" && !filepath.IsAbs(p.Data) {
			return fmt.Errorf("[pools.%s] data = %q: it is a path from /", name, p.Data)
		}
		if p.Engine == "auto" {
			return fmt.Errorf("[pools.%s] engine = \"auto\": it is \"docker\" or \"bwrap\"; leave it out for any", name)
		}
		if err := cmp.Or(b.check(), b.checkNamed()); err != nil {
			return fmt.Errorf("[pools.%s] %w", name, err)
		}
	}
	return nil
}

// leastMirror is the least [mirror] per_job: two entries.
const leastMirror = 64 << 10

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

// keep is how long what jobs leave behind stays.
func (c *config) keep() sshd.Keep {
	return sshd.Keep{Files: time.Duration(c.Blobs.Keep), Records: time.Duration(c.Queue.Keep)}
}

// local returns how many local runners there are to be on a machine with so many
// GPUs: with "auto" one for each gpus_per_slot of them, at least one.
func (c *config) local(gpus int) (int, error) {
	switch v := c.Runners.Local.(type) {
	case string:
		if v == "auto" {
			return max(1, gpus/c.Runners.PerSlot), nil
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
		m.GPUs, m.Network, m.BuildImage, m.Push = r.GPUs, r.Network, r.Build, r.Push
		all[keys.Role(name)] = m
	}
	return all
}

func set(to *int64, v *size) {
	if v != nil {
		*to = int64(*v)
	}
}

// reveal decrypts the values that may be secrets, with the host key in dir. Those of
// registries are for the local runners, which do it themselves; here they are tried.
func (c *config) reveal(dir string) error {
	host := filepath.Join(dir, "host_key")
	plain, err := decrypt(c.Mirror.Redis, host)
	if err != nil {
		return fmt.Errorf("[mirror] redis: %w", err)
	}
	c.Mirror.Redis = plain
	if c.Queue.Store, err = decrypt(c.Queue.Store, host); err != nil {
		return fmt.Errorf("[queue] store: %w", err)
	}
	if err := c.Queue.checkStore(); err != nil {
		return err
	}
	if err := c.Blobs.reveal(host); err != nil {
		return err
	}
	if n, err := c.local(1); err != nil || n == 0 {
		return err
	}
	_, err = accounts(c.Registries, host)
	return err
}

// decrypt returns a value that may be a secret, in the clear. key is the file of the key
// it was encrypted to.
func decrypt(text, key string) (string, error) {
	if !secret.Is(text) {
		return text, nil
	}
	private, err := os.ReadFile(key)
	if err != nil {
		return "", err
	}
	plain, err := secret.Decrypt(text, private)
	if err != nil {
		return "", cli.Hintf(err, "encrypt it to the key that is to read it: rai-crypto encrypt -r %s.pub", key)
	}
	return plain, nil
}

// mirror returns the mirror's options, nil for none.
func (c *config) mirror(logf func(string, ...any)) *stream.MirrorOptions {
	if c.Mirror.Redis == "" {
		return nil
	}
	return &stream.MirrorOptions{URL: c.Mirror.Redis, PerJob: int64(c.Mirror.PerJob), Memory: int64(c.Mirror.Memory), Keep: time.Duration(c.Mirror.Keep), Logf: logf}
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
