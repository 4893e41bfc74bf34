package sshd

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/crypto/ssh"

	"github.com/rai-project/raid/keys/secret"
	"github.com/rai-project/raid/runner/job"
)

// This file is what raid has to do with images that jobs build: who may, and how the
// password of a registry gets from a build file to the runner that pushes, and nowhere
// else. In the store it is encrypted to raid's host key, and gone when the job has ended.

// buildImage takes commands.build_image, if there is one.
func (c *call) buildImage(rec *job.Record, b *job.Build) error {
	if b.BuildImage == nil {
		return nil
	}
	order, err := b.BuildImage.Order()
	if err != nil {
		return failf(job.ExitInput, "it is in commands: build_image:", "%s", err)
	}
	if err := c.mayBuild(order, c.s.limits(c.Who.Role)); err != nil {
		return err
	}
	if b.Image != "" {
		c.say("rai: image: %s is not used: the job runs in the image that it builds", quote(b.Image))
	}
	rec.Image, rec.Spec.Image, rec.Spec.Build = order.Name, "", order
	if order.Push == nil {
		return nil
	}
	rec.Sealed, err = c.credentials(order.Push.Registry, b.BuildImage.Push)
	return err
}

// mayBuild says what staff would set.
func (c *call) mayBuild(order *job.ImageBuild, lim Limits) error {
	allow := func(what string) string {
		return fmt.Sprintf("staff would set it in raid.toml: [roles.%s] %s = true", c.Who.Role, what)
	}
	switch {
	case !lim.BuildImage:
		return failf(job.ExitRefused, allow("build_image"), "your role may not build images; name one that exists under rai: image:")
	case order.Push != nil && !lim.Push:
		return failf(job.ExitRefused, allow("push"), "your role may not push images")
	}
	return nil
}

// rebuildImage looks whether an old job may be run again as it was. Its credentials are
// kept nowhere.
func (c *call) rebuildImage(rec *job.Record, lim Limits) error {
	if rec.Spec.Build == nil {
		return nil
	}
	again := *rec.Spec.Build
	rec.Spec.Build, rec.Image = &again, again.Name
	if again.Push != nil {
		own, err := c.carried(again.Push.Registry)
		if err != nil {
			return err
		}
		if own == nil {
			c.say("the image is built again but not pushed: the credentials were for one job; submit it anew for that")
			again.Push = nil
		} else if rec.Sealed, err = c.s.seal(own); err != nil {
			return err
		}
	}
	return c.mayBuild(&again, lim)
}

// aes is how RAI's own client encrypted.
const aes = "==AES"

// credentials seals what is shown to a registry, by the build file or else by whoever
// submits it; "" for nothing.
func (c *call) credentials(registry string, p *job.BuildPush) (string, error) {
	if p.Username == "" && p.Password == "" {
		own, err := c.carried(registry)
		if err != nil {
			return "", err
		}
		if own == nil {
			c.say("no credentials for %s: it has to take the image from anybody", registry)
			return "", nil
		}
		c.say("the image is pushed to %s as %s: your ssh said so", registry, quote(own.Username))
		return c.s.seal(own)
	}
	if strings.HasPrefix(p.Username, aes) || strings.HasPrefix(p.Password, aes) {
		return "", failf(job.ExitInput, "encrypt it for this raid: "+c.encryptLine(registry), "the credentials were encrypted for RAI, with a key that raid has not")
	}
	if !secret.Is(p.Password) {
		c.say("the password stands in %s for everybody to read who gets the upload; better: %s", job.BuildFileName, c.encryptLine(registry))
	}
	who, err := c.opened(registry, job.Credentials{Username: p.Username, Password: p.Password})
	if err != nil {
		return "", err
	}
	return c.s.seal(who)
}

// carried returns the credentials that the caller's ssh brought along, nil if there are
// none for this registry: they are in the session's environment, and there only.
func (c *call) carried(registry string) (*job.Credentials, error) {
	text := c.Env(job.PushEnv)
	if text == "" {
		return nil, nil
	}
	to, who, ok := job.ParsePush(text)
	switch {
	case !ok:
		return nil, failf(job.ExitInput, "it looks like: SetEnv "+job.PushEnv+"=\""+registry+" USERNAME age:…\"", "%s was not understood", job.PushEnv)
	case to != registry:
		c.say("%s is for %s, not for %s: it is not used", job.PushEnv, quote(to), registry)
		return nil, nil
	}
	return c.opened(registry, who)
}

// opened are credentials in the clear.
func (c *call) opened(registry string, who job.Credentials) (*job.Credentials, error) {
	for _, v := range []*string{&who.Username, &who.Password} {
		plain, err := c.open(registry, *v)
		if err != nil {
			return nil, err
		}
		*v = plain
	}
	return &who, nil
}

func (c *call) encryptLine(registry string) string {
	return "rai-crypto encrypt -r host_key.pub --push " + c.Who.User + "@" + registry
}

// open decrypts a value of a build file. Only what was encrypted for this user and this
// registry is: a secret that somebody copied, from a build file or from raid.toml, is of
// no use to them.
func (c *call) open(registry, text string) (string, error) {
	if !secret.Is(text) {
		return text, nil
	}
	private, err := os.ReadFile(filepath.Join(c.s.Dir, "host_key"))
	if err != nil {
		return "", err
	}
	plain, err := secret.Decrypt(text, private)
	if err == nil {
		plain, err = secret.Unbind(plain, secret.Push(c.Who.User, registry))
	}
	if err != nil {
		return "", failf(job.ExitInput, "encrypt it like this: "+c.encryptLine(registry), "the credentials for %s cannot be decrypted: they were not made by you for it and for this raid", registry)
	}
	return plain, nil
}

// seal encrypts credentials to raid itself.
func (s *Server) seal(who *job.Credentials) (string, error) {
	b, err := json.Marshal(who)
	if err != nil {
		return "", err
	}
	return secret.Encrypt(string(b), string(ssh.MarshalAuthorizedKey(s.HostKeys[0].PublicKey())))
}

// unseal puts into an offer what only its runner may see.
func (s *Server) unseal(o *job.Offer) error {
	if o.Sealed == "" {
		return nil
	}
	private, err := os.ReadFile(filepath.Join(s.Dir, "host_key"))
	if err != nil {
		return err
	}
	text, err := secret.Decrypt(o.Sealed, private)
	if err != nil {
		return err
	}
	o.Sealed, o.Push = "", &job.Credentials{}
	return json.Unmarshal([]byte(text), o.Push)
}
